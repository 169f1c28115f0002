//! The site-to-site protocol over QUIC.
