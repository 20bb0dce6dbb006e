"""Relatives of PAPO, one short file each, run with --algo NAME."""
