"""verify_remote_file mfid:7: compare a copy on a mirror with size and hashes in the catalogue.

With fid:50 all copies of a file.
"""

from __future__ import annotations

from urllib.parse import quote

from upq_jobs import web
from upq_jobs.catalogue import OUTDATED, CatalogueJob, Limited, differing

from upq import Retry
from upq.when import duration


class Verify_remote_file(CatalogueJob):
    def check(self) -> bool:
        if not self.find_copies():
            return False
        try:
            self.http_timeout_s = duration(self.getcfg("http_timeout", "30s"))
        except ValueError as error:
            return self.refuse(f"[job {self.jobname}] {error}")
        if len(self.mfids) > 1:
            return True
        copy = self.catalogue.mirror_file(self.mfids[0])
        if copy is None:
            return self.refuse(f"No file on a mirror has mfid {self.mfids[0]}.")
        if copy.mirror_status != "active":
            return self.refuse(f"Mirror {copy.name} is {copy.mirror_status}.")
        if not copy.url:
            return self.refuse(f"Mirror {copy.name} has no web address.")
        if copy.status == OUTDATED:
            return self.refuse(f"Mirror {copy.name} has an older version: upload fid:{copy.fid}")
        self.copy = copy
        return True

    def find_copies(self) -> bool:
        """Set `self.mfids` to what has to be verified."""
        if "fid" not in self.jobdata or "mfid" in self.jobdata:
            self.mfids = [self.number] if self.find_number("mfid") else []
            return bool(self.mfids)
        if not self.find_number("fid"):
            return False
        self.mfids = [copy.mfid for copy in self.catalogue.copies(self.number) if copy.url]
        if not self.mfids:
            return self.refuse(f"No active mirror has a copy of file ({self.number}).")
        return True

    def run(self) -> bool:
        if len(self.mfids) > 1:
            self.result = self.each({"mfid": mfid} for mfid in self.mfids)
            self.msg(f"all {len(self.mfids)} copies are ok")
            return True
        mfid, fid = self.copy.mfid, self.copy.fid
        url = f"{self.copy.url.rstrip('/')}/{quote(self.copy.path.lstrip('/'))}"
        stored = self.catalogue.hashes(fid)
        if not stored:
            return self.refuse(f"No hashes of file ({fid}) in DB: hash fid:{fid} makes them")
        status, why = self.compare(url, stored)
        self.catalogue.checked_mirror_file(mfid, status)
        self.result = {"mfid": mfid, "fid": fid, "url": url, "status": status, "why": why}
        self.msg(f"{url} is {status}: {why}")
        return status == "ok"

    def compare(self, url: str, stored: dict[str, str]) -> tuple[str, str]:
        """What the copy is, and why. Raises Retry when this cannot be said now."""
        size = self.copy.size
        with web.fetch(url, timeout_s=self.http_timeout_s, expected=(404, 410)) as answer:
            if answer.code in (404, 410):
                return "missing", f"{answer.code} {answer.reason}"
            told = answer.length
            if told not in (None, size):
                return "damaged", f"it has {told} bytes, not {size}"
            body = Limited(answer, size + 1)
            found = self.digests(body, size)
        if body.size < size and told is not None:
            raise Retry(f"{url}: cut off after {body.size} of {size} bytes")
        if body.size != size:
            return "damaged", f"it has {'more' if body.size > size else 'fewer'} than {size} bytes"
        if wrong := differing(stored, found):
            return "damaged", f"hashes differ from those in DB: {wrong}"
        return "ok", f"{', '.join(stored)} match those in DB"
