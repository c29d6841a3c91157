"""What the processes of a repeated run execute: the command line of a run written as YAML, as recipes/train.py."""

from mosaic_dist.run import main_from_yaml

if __name__ == "__main__":
    main_from_yaml()
