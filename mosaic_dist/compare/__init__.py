"""Runs beside each other: pictures, reports, sweeps over variants, and what came out of them."""
