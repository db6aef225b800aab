"""`python -m mmtransfer` is the command `mmtransfer`."""

from mmtransfer.cli import entry

entry()
