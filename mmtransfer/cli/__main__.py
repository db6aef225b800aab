"""`python -m mmtransfer.cli` is the command `mmtransfer`."""

from mmtransfer.cli import entry

entry()
