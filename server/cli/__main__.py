"""`python -P -m server.cli`, as the supervisor starts its children."""

from server.cli import main

if __name__ == "__main__":
    main()
