"""Command line of the phantom: `python -m examples.akoa.phantom`."""

from examples.akoa.phantom.dataset import main

if __name__ == "__main__":
    main()
