from workingpapers.cli import main

raise SystemExit(main())
