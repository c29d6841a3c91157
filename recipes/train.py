"""Train a run that is written as YAML: `deepspeed recipes/train.py --config run.yaml`."""

from mosaic_dist.run import main_from_yaml

if __name__ == "__main__":
    main_from_yaml()
