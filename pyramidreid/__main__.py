"`python -m pyramidreid` is the command `pyramidreid`."
import sys

from pyramidreid.cli.frame import main

if __name__=='__main__': sys.exit(main())
