"""`python -m nanodiff.compare`: every way of fine-tuning side by side, see nanodiff/report/compare.py."""

from nanodiff.report.compare import main

if __name__ == "__main__":
    main()
