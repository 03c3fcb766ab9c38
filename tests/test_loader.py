from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from upq import UpqJob
from upq.errors import Broken
from upq.loader import Loader, blame

JOB = "from upq import UpqJob\n\n\nclass Good(UpqJob):\n    pass\n"


@pytest.fixture
def jobs_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "jobs"
    folder.mkdir(mode=0o755)
    return folder


def put(folder: Path, name: str, text: str) -> Path:
    file = folder / f"{name}.py"
    file.write_text(text)
    file.chmod(0o644)
    return file


def fault(folder: Path, name: str) -> str:
    with pytest.raises(Broken) as broken:
        Loader(folder).load(name)
    return str(broken.value)


# Loading


def test_a_class_is_found_by_the_name_of_its_file(jobs_dir: Path) -> None:
    put(jobs_dir, "good", JOB)
    put(jobs_dir, "verify_local_file", JOB.replace("Good", "Verify_local_file"))
    loader = Loader(jobs_dir)
    assert loader.load("good").__name__ == "Good"
    assert loader.load("verify_local_file").__name__ == "Verify_local_file"
    assert loader.has("good")
    assert not loader.has("bad")


@pytest.mark.parametrize("name", ["json", "queue", "test", "upq"])
def test_a_job_named_like_a_library_is_not_the_library(jobs_dir: Path, name: str) -> None:
    put(jobs_dir, name, JOB.replace("Good", name.title()) + "\n\nimport json\njson.dumps(1)\n")
    found = Loader(jobs_dir).load(name)
    assert issubclass(found, UpqJob)
    assert sys.modules["json"] is json


def test_jobs_share_modules_of_their_folder(jobs_dir: Path) -> None:
    put(jobs_dir, "shared", "NAME = 'x'\n")
    put(jobs_dir, "good", JOB + "\n\nfrom upq_jobs.shared import NAME\nfrom . import shared\n")
    Loader(jobs_dir).load("good")


def test_a_new_loader_finds_the_files_as_they_are_now(jobs_dir: Path) -> None:
    put(jobs_dir, "shared", "N = 1\n")
    text = JOB + "    from upq_jobs.shared import N\n    n = N\n"
    put(jobs_dir, "good", text)
    old = Loader(jobs_dir).load("good")
    # The same size and, quick as this is, the same time: a byte code cache would be believed.
    put(jobs_dir, "shared", "N = 2\n")
    assert (Loader(jobs_dir).load("good").n, old.n) == (2, 1)
    assert not (jobs_dir / "__pycache__").exists()


def test_sys_path_is_never_looked_at(
    jobs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "other", JOB)
    monkeypatch.syspath_prepend(tmp_path)
    assert "no such file" in fault(jobs_dir, "other")


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("x = 1\nclass Good(UpqJob:\n", 2, "SyntaxError"),
        ("import nowhere_at_all\n", 1, "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def f():\n    return 1 / 0\n\n\nf()\n", 2, "ZeroDivisionError"),
        ("import sys\nsys.exit(3)\n", 2, "SystemExit: 3"),
        ("from upq_jobs.bad import X\n", 1, "ImportError"),
        ("import json\njson.loads('{')\n", 2, "JSONDecodeError"),
        ("a = '\0'\n", None, "null bytes"),
    ],
)
def test_a_broken_module_is_blamed_with_file_and_line(
    jobs_dir: Path, text: str, line: int | None, what: str
) -> None:
    put(jobs_dir, "bad", "")
    file = put(jobs_dir, "good", text)
    told = fault(jobs_dir, "good")
    assert what in told
    assert told.startswith(f"{file}:{line}: " if line else str(file))


def test_a_fault_in_a_shared_module_is_blamed_there(jobs_dir: Path) -> None:
    shared = put(jobs_dir, "shared", "x = 1\n\ny = x.z\n")
    put(jobs_dir, "good", "import upq_jobs.shared\n")
    assert fault(jobs_dir, "good").startswith(f"{shared}:3: AttributeError")


@pytest.mark.parametrize(
    "text", ["", "class Good:\n    pass\n", "Good = 5\n", JOB.replace("Good", "GooD")]
)
def test_a_module_without_its_class_is_broken(jobs_dir: Path, text: str) -> None:
    file = put(jobs_dir, "good", text)
    assert fault(jobs_dir, "good") == f"{file}: no class Good(UpqJob)"


def test_a_broken_module_leaves_the_others_alone(jobs_dir: Path) -> None:
    put(jobs_dir, "good", JOB)
    put(jobs_dir, "bad", "import sys\nsys.exit(1)\n")
    loader = Loader(jobs_dir)
    with pytest.raises(Broken):
        loader.load("bad")
    assert loader.load("good").__name__ == "Good"


def test_the_innermost_line_of_the_jobs_own_folder_is_blamed(jobs_dir: Path) -> None:
    file = put(
        jobs_dir,
        "good",
        JOB + "\n    def run(self):\n        import json\n        json.loads('x')\n",
    )
    job = Loader(jobs_dir).load("good")("good", {})
    with pytest.raises(ValueError) as raised:
        job.run()
    assert blame(raised.value, file).startswith(f"{file}:9: JSONDecodeError")


# Files that others could have written


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666, 0o777])
def test_a_file_that_others_can_write_is_refused(jobs_dir: Path, mode: int) -> None:
    file = put(jobs_dir, "good", JOB)
    os.chown(file, -1, other_group())
    file.chmod(mode)
    assert fault(jobs_dir, "good").startswith(f"{file}: others can write it")


def other_group() -> int:
    """A group that is nobody's own."""
    if os.getuid() != 0:
        pytest.skip("only root can give a file to another group")
    return 50  # staff


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_a_folder_that_others_can_write_is_refused(jobs_dir: Path, mode: int) -> None:
    put(jobs_dir, "good", JOB)
    os.chown(jobs_dir, -1, other_group())
    jobs_dir.chmod(mode)
    assert fault(jobs_dir, "good").startswith(f"{jobs_dir}: others can write it")


def test_a_folder_above_that_others_can_write_is_refused(tmp_path: Path) -> None:
    above = tmp_path / "above"
    (above / "jobs").mkdir(parents=True)
    put(above / "jobs", "good", JOB)
    above.chmod(0o757)
    assert fault(above / "jobs", "good").startswith(f"{above}: others can write it")


def test_a_file_of_another_user_is_refused(jobs_dir: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a file away")
    file = put(jobs_dir, "good", JOB)
    os.chown(file, 65534, -1)
    assert "owned by uid 65534" in fault(jobs_dir, "good")


def test_a_link_out_of_the_folder_is_refused(jobs_dir: Path, tmp_path: Path) -> None:
    outside = put(tmp_path, "outside", JOB)
    (jobs_dir / "good.py").symlink_to(outside)
    assert "leads out of" in fault(jobs_dir, "good")


def test_a_link_within_the_folder_is_followed(jobs_dir: Path) -> None:
    put(jobs_dir, "real", JOB)
    (jobs_dir / "good.py").symlink_to("real.py")
    assert Loader(jobs_dir).load("good").__name__ == "Good"


def test_a_folder_that_is_itself_a_link_is_followed(jobs_dir: Path, tmp_path: Path) -> None:
    put(jobs_dir, "good", JOB)
    (tmp_path / "link").symlink_to(jobs_dir)
    assert Loader(tmp_path / "link").load("good").__name__ == "Good"


def test_a_shared_module_that_others_can_write_is_refused(jobs_dir: Path) -> None:
    shared = put(jobs_dir, "shared", "N = 1\n")
    put(jobs_dir, "good", JOB + "import upq_jobs.shared\n")
    shared.chmod(0o646)
    assert f"{shared}: others can write it" in fault(jobs_dir, "good")


def test_what_a_refused_file_holds_is_never_run(jobs_dir: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    put(jobs_dir, "good", f"open({str(canary)!r}, 'w')\n" + JOB).chmod(0o646)
    fault(jobs_dir, "good")
    assert not canary.exists()


# Parameters of a class


def test_a_class_has_its_parameters_as_attributes(jobs_dir: Path) -> None:
    text = JOB.replace("    pass", "    fid: int\n    path: Path | None = None")
    put(jobs_dir, "good", f"from pathlib import Path\n{text}")
    cls: Any = Loader(jobs_dir).load("good")
    job = cls("good", {"fid": 5, "path": "/a"})
    assert (job.fid, job.path, str(cls.declared)) == (5, Path("/a"), "fid:int path:path?")
    assert cls("good", {"fid": 5}).path is None


@pytest.mark.parametrize("name", ["output", "result", "retries", "declared"])
def test_an_annotation_at_fault_breaks_its_type_with_its_line(jobs_dir: Path, name: str) -> None:
    put(jobs_dir, "good", JOB.replace("    pass", f"    fid: int\n    {name}: str"))
    assert fault(jobs_dir, "good") == (
        f"{jobs_dir}/good.py:6: {name}: every job has an attribute of that name; choose another"
    )
