#!/usr/bin/env python3
"""Start the daemon from the source tree; the installed command is `upq`."""

import sys

from upq.launch import main

sys.exit(main())
