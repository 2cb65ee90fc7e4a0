"""`python -m ckavg`."""

from ckavg.cli import main

if __name__ == "__main__":
    main()
