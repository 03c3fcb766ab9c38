#!/usr/bin/env python3
"""Start the daemon from the source tree; the installed command is `upq`."""

import os
import sys
from pathlib import Path

try:
    from upq.launch import main
except ModuleNotFoundError as missing:
    # What upq needs is where `make` has put it.
    venv = Path(__file__).resolve().parent / ".venv"
    if (venv / "bin/python").exists() and Path(sys.prefix) != venv:
        os.execv(venv / "bin/python", [str(venv / "bin/python"), *sys.argv])
    sys.exit(f"upq: Python has no module {missing.name}; `make run` fetches what upq needs")

sys.exit(main())
