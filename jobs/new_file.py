"""new_file file:/path or fid:50: take a file into the catalogue; the jobs after it find its fid."""

from __future__ import annotations

from typing import Any

from upq_jobs.catalogue import CatalogueJob


class New_file(CatalogueJob):
    def check(self) -> bool:
        if "fid" in self.jobdata:
            return self.find_file()
        path = str(self.jobdata.get("file") or "")
        if not path:
            return self.refuse("Either file or fid has to be set!")
        return self.is_readable(path) and self.is_ours(self.catalogue.find(path))

    def is_ours(self, file: Any) -> bool:
        # A run that was interrupted after it added the file meets its own work.
        if file is None or file.added_by == self.jobid:
            return True
        return self.refuse(f"File {file.path} already exists: fid: {file.fid}")

    def run(self) -> bool:
        if "fid" in self.jobdata:
            changed = self.catalogue.renew(self.file)
            self.msg("File changed, " if changed else "File already known, ")
            file = self.catalogue.file(self.file.fid)
        else:
            file = self.catalogue.add(self.jobdata["file"], self.jobid)
            if not self.is_ours(file):
                return False
        self.jobdata["fid"] = file.fid
        self.msg(f"Filename: {file.path} Size: {file.size}")
        return True
