//! The API as a client sees it that keeps to no rules: HTTPS by hand.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::Value;

/// How long the center may say nothing.
const SILENCE: Duration = Duration::from_secs(60);

/// The longest answer that is read, in bytes.
const MAX_ANSWER: u64 = 8 << 20;

/// The API of a center.
#[derive(Debug, Clone)]
pub struct Api {
    address: String,
    token: String,
    roots: Arc<RootCertStore>,
    tls: Arc<ClientConfig>,
}

/// What is sent as a body.
#[derive(Debug, Clone, Copy)]
pub enum Body<'a> {
    /// Nothing.
    None,
    /// These bytes.
    Whole(&'a [u8]),
    /// These bytes, after telling of so many.
    Claimed(u64, &'a [u8]),
    /// Mebibytes of one letter, as chunks.
    Endless(usize),
}

/// How a request was answered.
#[derive(Debug, Clone)]
pub struct Reply {
    /// The status; 0 when there was no answer.
    pub status: u16,
    /// The body.
    pub text: String,
}

impl Reply {
    /// What the center says that was wrong.
    #[must_use]
    pub fn message(&self) -> String {
        let fault: Value = serde_json::from_str(&self.text)
            .unwrap_or_else(|e| panic!("{} {:?}: {e}", self.status, self.text));
        fault["message"].as_str().unwrap_or_else(|| panic!("{}", self.text)).to_owned()
    }
}

impl Api {
    /// The API that the files of a client in `config` lead to.
    pub(crate) fn of(config: &Path) -> Self {
        let read = |name: &str| std::fs::read_to_string(config.join(name)).expect(name);
        let address = read("api").trim().trim_start_matches("https://").to_owned();
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(read("ca.pem").as_bytes()) {
            roots.add(certificate.expect("a certificate")).expect("a root");
        }
        let roots = Arc::new(roots);
        let tls = Arc::new(client(&roots, rustls::ALL_VERSIONS));
        Self { address, token: read("token").trim().to_owned(), roots, tls }
    }

    /// Which of the protocols `offered` the center picks; `None` when there is no connection by
    /// these versions of TLS.
    #[must_use]
    pub fn picks(
        &self,
        versions: &[&'static rustls::SupportedProtocolVersion],
        offered: &[&[u8]],
    ) -> Option<Vec<u8>> {
        let mut tls = client(&self.roots, versions);
        tls.alpn_protocols = offered.iter().map(|p| p.to_vec()).collect();
        let mut tcp = TcpStream::connect(&self.address).expect("connecting to the API");
        tcp.set_read_timeout(Some(SILENCE)).expect("time-out");
        let name = ServerName::try_from("127.0.0.1").expect("a name");
        let mut tls = ClientConnection::new(Arc::new(tls), name).expect("TLS");
        while tls.is_handshaking() {
            tls.complete_io(&mut tcp).ok()?;
        }
        tls.alpn_protocol().map(<[u8]>::to_vec)
    }

    /// Sends a request with the operator's token; a body is `application/json`.
    #[must_use]
    pub fn ask(&self, method: &str, path: &str, body: Body<'_>) -> Reply {
        self.ask_as(method, path, "application/json", body)
    }

    /// As [`Api::ask`], with a body of another type.
    #[must_use]
    pub fn ask_as(&self, method: &str, path: &str, kind: &str, body: Body<'_>) -> Reply {
        let mut head = format!(
            "{method} {path} HTTP/1.1\r\nHost: center\r\nConnection: close\r\n\
             Authorization: Bearer {}\r\n",
            self.token
        );
        if !matches!(body, Body::None) {
            head += &format!("Content-Type: {kind}\r\n");
        }
        match body {
            Body::None => {}
            Body::Whole(b) => head += &format!("Content-Length: {}\r\n", b.len()),
            Body::Claimed(n, _) => head += &format!("Content-Length: {n}\r\n"),
            Body::Endless(_) => head += "Transfer-Encoding: chunked\r\n",
        }
        head += "\r\n";
        self.talk(|stream| {
            stream.write_all(head.as_bytes())?;
            match body {
                Body::None => Ok(()),
                Body::Whole(b) | Body::Claimed(_, b) => stream.write_all(b),
                Body::Endless(mib) => {
                    let letters = vec![b'a'; 1 << 20];
                    for _ in 0..mib {
                        write!(stream, "{:x}\r\n", letters.len())?;
                        stream.write_all(&letters)?;
                        stream.write_all(b"\r\n")?;
                    }
                    stream.write_all(b"0\r\n\r\n")
                }
            }
        })
    }

    /// Sends these bytes as they are.
    #[must_use]
    pub fn raw(&self, bytes: &[u8]) -> Reply {
        self.talk(|stream| stream.write_all(bytes))
    }

    fn talk(
        &self,
        send: impl FnOnce(&mut StreamOwned<ClientConnection, TcpStream>) -> std::io::Result<()>,
    ) -> Reply {
        let tcp = TcpStream::connect(&self.address).expect("connecting to the API");
        tcp.set_read_timeout(Some(SILENCE)).expect("time-out");
        tcp.set_write_timeout(Some(SILENCE)).expect("time-out");
        let name = ServerName::try_from("127.0.0.1").expect("a name");
        let tls = ClientConnection::new(self.tls.clone(), name).expect("TLS");
        let mut stream = StreamOwned::new(tls, tcp);
        // A center that does not want to hear the rest closes; its answer is there to be read.
        let _ = send(&mut stream).and_then(|()| stream.flush());
        let mut answer = Vec::new();
        let _ = stream.take(MAX_ANSWER).read_to_end(&mut answer);
        let text = String::from_utf8_lossy(&answer);
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        Reply { status, text: body.to_owned() }
    }
}

fn client(
    roots: &Arc<RootCertStore>,
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> ClientConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .expect("versions")
        .with_root_certificates(roots.clone())
        .with_no_client_auth()
}
