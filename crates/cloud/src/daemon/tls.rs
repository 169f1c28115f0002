//! The API's certificate: self-signed, made once, trusted by clients as a file; or the operator's
//! own, read again whenever its files change or the daemon gets SIGHUP.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum_server::tls_rustls::RustlsConfig;
use godwit_types::{Code, Fault};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::signal::unix::{SignalKind, signal};

use super::secrets::{make_dir, write_private};

/// How often the operator's files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// The files of a certificate that the operator has from elsewhere (PEM).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate and those that signed it, its own first.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl TlsFiles {
    /// What is in them, for the server and for clients.
    fn read(&self) -> Result<(String, Arc<rustls::ServerConfig>), Fault> {
        let about = |f: Fault| {
            let code = if f.code == Code::Internal { Code::Invalid } else { f.code };
            Fault { code, message: format!("{} ({})", f.message, self.certificate.display()), ..f }
        };
        let pem =
            std::fs::read_to_string(&self.certificate).map_err(|e| about(fail("reading", &e)))?;
        let made = configure(&pem, &self.key).map_err(about)?;
        Ok((pem, made))
    }

    /// When they were last changed, as far as that can be told.
    fn changed(&self) -> [Option<SystemTime>; 2] {
        [&self.certificate, &self.key].map(|f| std::fs::metadata(f).and_then(|m| m.modified()).ok())
    }

    /// The certificate (PEM) and the server's configuration.
    pub(super) fn server(&self) -> Result<(String, RustlsConfig), Fault> {
        let (pem, config) = self.read()?;
        Ok((pem, RustlsConfig::from_config(config)))
    }

    /// Reads them again when they have changed, or at SIGHUP. What cannot be used changes nothing.
    pub(super) async fn keep(self, server: RustlsConfig) {
        let mut seen = self.changed();
        let mut hup = match signal(SignalKind::hangup()) {
            Ok(hup) => hup,
            Err(error) => {
                tracing::error!(%error, "the API's certificate is not read again");
                return;
            }
        };
        loop {
            let asked = tokio::select! {
                _ = hup.recv() => true,
                () = tokio::time::sleep(LOOK_EVERY) => false,
            };
            let now = self.changed();
            if !asked && now == seen {
                continue;
            }
            let files = self.clone();
            match tokio::task::spawn_blocking(move || files.read()).await {
                Ok(Ok((_, config))) => {
                    server.reload_from_config(config);
                    seen = now;
                    tracing::info!(file = %self.certificate.display(), "the API's certificate was read again");
                }
                Ok(Err(error)) => {
                    // Perhaps the key is not there yet: looked at again.
                    tracing::warn!(%error, "the API keeps its certificate");
                }
                Err(error) => tracing::warn!(%error, "the API keeps its certificate"),
            }
        }
    }
}

fn fail(doing: &str, e: &dyn std::error::Error) -> Fault {
    Fault::internal(format!("{doing} the API's certificate: {}", godwit_types::chain(e)))
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
    let config = configure(&pem, &key)?;
    Ok((pem, RustlsConfig::from_config(config)))
}

/// TLS 1.3 alone, with this certificate (PEM).
fn configure(pem: &str, key: &Path) -> Result<Arc<rustls::ServerConfig>, Fault> {
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|e| fail("reading", &e))?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(|e| fail("reading the key of", &e))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .and_then(|b| b.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|e| {
            let mut f = fail("using", &e);
            f.code = Code::Damaged;
            f
        })?;
    // Displays and consoles are HTTP/1.1 upgrades; a client that needs one offers no h2.
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_operator_are_used_only_when_they_fit() {
        let dir = tempfile::tempdir().expect("dir");
        let at = |name: &str| dir.path().join(name);
        let write = |pair: &rcgen::KeyPair, suffix: &str| {
            let names = vec!["api.example".to_owned()];
            let params = rcgen::CertificateParams::new(names).expect("params");
            let made = params.self_signed(pair).expect("signed");
            std::fs::write(at(&format!("cert{suffix}")), made.pem()).expect("write");
            std::fs::write(at(&format!("key{suffix}")), pair.serialize_pem()).expect("write");
        };
        write(&rcgen::KeyPair::generate().expect("key"), "1");
        write(&rcgen::KeyPair::generate().expect("key"), "2");
        let files = |c: &str, k: &str| TlsFiles { certificate: at(c), key: at(k) };
        let (pem, config) = files("cert1", "key1").read().expect("good");
        assert!(pem.contains("BEGIN CERTIFICATE"));
        assert_eq!(config.alpn_protocols, [b"h2".to_vec(), b"http/1.1".to_vec()]);
        assert_eq!(files("cert1", "key2").read().expect_err("other key").code, Code::Damaged);
        let none = files("cert3", "key1").read().expect_err("no file");
        assert!(none.message.contains("cert3"), "{none}");
    }
}
