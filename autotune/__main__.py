"""``python -m tritonconv.autotune`` is the command: for torchrun, and where no script is found."""

from .cli import main

if __name__ == "__main__":
    main()
