"`python -m pyramidreid` runs the command line."
import sys

from pyramidreid.cli.entry import main

if __name__=='__main__': sys.exit(main())
