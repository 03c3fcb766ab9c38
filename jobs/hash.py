"""hash fid:50 or file:/path: md5, sha1 and sha256 of a file; those of a fid are kept."""

from __future__ import annotations

from upq_jobs.catalogue import CatalogueJob, differing


class Hash(CatalogueJob):
    file = None

    def check(self) -> bool:
        if "file" in self.jobdata and "fid" not in self.jobdata:
            return self.is_readable(str(self.jobdata["file"]))
        return self.find_file()

    def run(self) -> bool:
        self.result = self.digests_of(self.file.path if self.file else self.jobdata["file"])
        if self.file and not self.keep(self.file.fid, self.file.path):
            return False
        self.msg(f"sha256: {self.result['sha256']}")
        return True

    def keep(self, fid: int, path: str) -> bool:
        wrong = differing(self.catalogue.keep_hashes(fid, self.result), self.result)
        if not wrong:
            return True
        # A damaged file must not become the good one by being hashed again.
        self.msg(f"File ({fid}) {path} has other hashes in DB: {wrong}. ")
        return self.refuse(f"If it was changed on purpose: new_file fid:{fid}")
