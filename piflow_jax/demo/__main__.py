"""`python -m piflow_jax.demo`."""

from piflow_jax.demo.command import main

if __name__ == "__main__":
    main()
