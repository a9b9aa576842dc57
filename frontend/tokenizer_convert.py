"""Makes a tokenizer.json for a model folder that has only older files (vocab.txt, tokenizer.model, …).

Runs as a program of its own, `python tokenizer_convert.py FOLDER`, and writes the JSON to standard output:
the conversion needs transformers, and with it torch, which a frontend never loads.
"""

import sys
from pathlib import Path


def convert_folder(folder: Path) -> str:
    """tokenizer.json of the folder's tokenizer, as transformers makes it. Code in the folder is not run."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), use_fast=True, local_files_only=True)
    text: str = tokenizer.backend_tokenizer.to_str()
    return text


if __name__ == "__main__":
    sys.stdout.buffer.write(convert_folder(Path(sys.argv[1])).encode("utf-8"))
