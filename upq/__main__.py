"""`python -m upq` starts the daemon."""

import sys

from upq.launch import main

sys.exit(main())
