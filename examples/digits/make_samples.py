"""Writes the samples of this campaign into ``data/`` beside this file."""

from pathlib import Path

from optimize.demo.digits import write_samples

if __name__ == "__main__":
    folder = Path(__file__).parent / "data"
    write_samples(folder)
    print(f"Samples are in {folder}")
