"""The listing as a web page: browse, search, run and subscribe (`workingpapers serve`)."""
