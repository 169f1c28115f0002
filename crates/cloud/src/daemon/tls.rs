//! The API's certificate: self-signed, made once, trusted by clients as a file.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use axum_server::tls_rustls::RustlsConfig;
use godwit_types::Code;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::secrets::{make_dir, write_private};
use crate::error::Fault;

fn fail(doing: &str, e: &dyn std::error::Error) -> Fault {
    Fault::internal(format!("{doing} the API's certificate: {}", crate::error::chain(e)))
}

/// The certificate (PEM) and the server's configuration, for `address` and the names of this
/// host on loopback.
pub(super) fn server(dir: &Path, address: SocketAddr) -> Result<(String, RustlsConfig), Fault> {
    make_dir(dir)?;
    let (cert, key) = (dir.join("api.pem"), dir.join("api.key"));
    let names = dir.join("api.names");
    let mut wanted = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    let ip = address.ip().to_string();
    if !address.ip().is_unspecified() && !wanted.contains(&ip) {
        wanted.push(ip);
    }
    let wanted_text = wanted.join("\n");
    let kept = std::fs::read_to_string(&names).ok().as_deref() == Some(&wanted_text);
    if !(kept && cert.exists() && key.exists()) {
        let key_pair = rcgen::KeyPair::generate().map_err(|e| fail("making", &e))?;
        let mut params = rcgen::CertificateParams::new(wanted).map_err(|e| fail("making", &e))?;
        params.distinguished_name.push(rcgen::DnType::CommonName, "godwit api");
        // Clients refuse an authority's certificate as a server's.
        params.is_ca = rcgen::IsCa::ExplicitNoCa;
        let made = params.self_signed(&key_pair).map_err(|e| fail("making", &e))?;
        write_private(&key, key_pair.serialize_pem().as_bytes())?;
        write_private(&cert, made.pem().as_bytes())?;
        write_private(&names, wanted_text.as_bytes())?;
    }
    let pem = std::fs::read_to_string(&cert).map_err(|e| fail("reading", &e))?;
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|e| fail("reading", &e))?;
    let key = PrivateKeyDer::from_pem_file(&key).map_err(|e| fail("reading the key of", &e))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|b| b.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|e| {
            let mut f = fail("using", &e);
            f.code = Code::Damaged;
            f
        })?;
    // Displays and consoles are HTTP/1.1 upgrades.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok((pem, RustlsConfig::from_config(Arc::new(config))))
}
