"""Helpers for programs that use Tercet, in the places where vLLM has them."""

from tercet.utils.argparse_utils import FlexibleArgumentParser

__all__ = ["FlexibleArgumentParser"]
