//! Guest images built from Debian packages.
