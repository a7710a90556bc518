"""`python -m petalnet` is `petalnet`."""

from petalnet.cli import main

if __name__ == "__main__":
    main()
