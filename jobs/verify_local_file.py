"""verify_local_file fid:50: compare a file on disk with the hashes in the catalogue."""

from __future__ import annotations

from upq_jobs.catalogue import CatalogueJob, differing


class Verify_local_file(CatalogueJob):
    def check(self) -> bool:
        return self.find_file()

    def run(self) -> bool:
        fid, path = self.file.fid, self.file.path
        stored = self.catalogue.hashes(fid)
        if not stored:
            return self.refuse(f"No hashes of file ({fid}) {path} in DB: hash fid:{fid} makes them")
        wrong = differing(stored, self.digests_of(path))
        self.catalogue.checked(fid)
        self.result = {"fid": fid, "path": path, "match": not wrong, "differing": wrong}
        if wrong:
            return self.refuse(f"Hashes of file ({fid}) {path} do not match those in DB: {wrong}")
        self.msg(f"Hashes of file ({fid}) {path} match those in DB.")
        return True
