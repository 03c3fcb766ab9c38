#!/usr/bin/env python3
"""The command line of upq, started from the source tree."""

import sys

from upq.cli import main

sys.exit(main())
