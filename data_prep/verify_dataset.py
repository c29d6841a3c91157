"""`python -m data_prep.verify_dataset`: read a dataset again, and name every file that is not as it was written."""

import sys
from json import dumps

from mosaic_dist.cli import run_command
from mosaic_dist.data.verify import verify
from mosaic_dist.errors import UserError
from mosaic_dist.spec import Positive

BROKEN_EXIT_CODE = 1


def verify_dataset(*folder: str, threads: Positive = 4, json: bool = False) -> None:
    """Read every byte of a dataset again and name every broken file.

    python -m data_prep.verify_dataset DIR

    Checks dataset.json, the tokenizer, the indexes, sizes and checksums of all shards (compressed and inflated), the
    number of samples and tokens, token ids beyond the vocabulary, and files that do not belong there. Ends with exit
    code 0 if all is whole, 1 if a file is broken, and 2 if there is nothing to check. Writes nothing.

    --threads is the number of shards that are read, and held in memory, at once. --json is for programs.
    """
    if len(folder) != 1:
        raise UserError(f"give one folder, not {len(folder)}: {' '.join(map(str, folder))}")
    report = verify(str(folder[0]), threads)
    broken = len({problem.file for problem in report.problems})
    if json:
        facts = report._asdict() | {"path": str(report.path), "whole": not broken}
        print(dumps(facts | {"problems": [problem._asdict() for problem in report.problems]}, indent=2))
    else:
        for problem in report.problems:
            print(f"{report.path / problem.file} {problem.told}")
        verdict = f"{broken} broken: copy or prepare the data again" if broken else "whole"
        print(f"{report.path}: {report.files} files, {report.size_bytes / 1e6:,.1f} MB in shards, {verdict}")
    if broken:
        sys.exit(BROKEN_EXIT_CODE)


if __name__ == "__main__":
    run_command(verify_dataset, "python -m data_prep.verify_dataset")
