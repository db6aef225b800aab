"""`python -m mmtransfer` is the command `mmtransfer`."""

import sys

from mmtransfer.cli import main

sys.exit(main())
