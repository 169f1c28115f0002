//! The center's API over HTTPS.

use std::error::Error as _;
use std::path::PathBuf;
use std::time::Duration;

use futures::StreamExt;
use godwit_cloud::api::{REVISION_HEADER, TENANT_HEADER};
use godwit_cloud::daemon::read_token;
use godwit_types::Code;
use godwit_types::Fault;
use reqwest::{Certificate, Method, RequestBuilder, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::args::{Connect, or_env};
use crate::failure::{Failure, Result};

/// Where a center's API is when nothing else is said.
const DEFAULT_API: &str = "https://127.0.0.1:7700";

/// How long a connection to the center may take.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// How long the center may take to answer what it only has to look up.
const ANSWER_WITHIN: Duration = Duration::from_secs(90);

/// The longest answer that is read whole, in bytes.
const MAX_ANSWER: usize = 64 << 20;

/// The center, as this command reaches it.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    http: reqwest::Client,
    base: String,
    token: String,
    tenant: Option<String>,
    ca: PathBuf,
}

/// Nothing to send.
pub(crate) const EMPTY: Option<&()> = None;

impl Client {
    /// Reads address, certificate and token: from flags, environment, then the client's files.
    pub(crate) fn open(connect: &Connect) -> Result<Self> {
        let files = connect.files();
        let base = match or_env(connect.api.as_ref(), "GODWIT_API") {
            Some(a) => a,
            None => std::fs::read_to_string(files.api()).unwrap_or_else(|_| DEFAULT_API.into()),
        };
        let base = base.trim().trim_end_matches('/').to_owned();
        if !base.starts_with("https://") {
            return Err(Failure::usage(format!("'{base}' is no address of an API"))
                .hint("write it as https://HOST:PORT"));
        }
        let ca = or_env(connect.ca.as_ref(), "GODWIT_CA").unwrap_or_else(|| files.ca());
        let pem = std::fs::read(&ca).map_err(|e| {
            Failure::unavailable(format!("reading the API's certificate {}: {e}", ca.display()))
                .hint("start a center with: godwit up, or name another center's file with --ca")
        })?;
        let certificates =
            Certificate::from_pem_bundle(&pem).ok().filter(|c| !c.is_empty()).ok_or_else(|| {
                Failure::new(Code::Damaged, format!("{} holds no certificate", ca.display()))
            })?;
        let token = match std::env::var("GODWIT_TOKEN") {
            Ok(t) if !t.is_empty() => t,
            _ => {
                let file = or_env(connect.token_file.as_ref(), "GODWIT_TOKEN_FILE")
                    .unwrap_or_else(|| files.token());
                read_token(&file).map_err(|f| {
                    if f.code == Code::Damaged {
                        return Failure::from(f);
                    }
                    let advised = f.hint.is_some();
                    let words = format!("no operator token: {f}");
                    let failure = Failure::from(Fault::new(Code::Unauthenticated, words));
                    match f.hint {
                        Some(h) if advised => failure.hint(h),
                        _ => failure.hint(
                            "it is in ~/.config/godwit/token of whoever started the center; \
                             set GODWIT_TOKEN or name the file with --token-file",
                        ),
                    }
                })?
            }
        };
        // The center is asked directly: a proxy would see the operator's token.
        let http = reqwest::Client::builder()
            .no_proxy()
            .https_only(true)
            .http1_only()
            .tls_certs_only(certificates)
            .connect_timeout(CONNECT_WITHIN)
            .build()
            .map_err(|e| Failure::internal(format!("preparing HTTPS: {}", causes(&e))))?;
        let tenant = connect.tenant.as_ref().map(ToString::to_string);
        let tenant = or_env(tenant.as_ref(), "GODWIT_TENANT");
        Ok(Self { http, base, token, tenant, ca })
    }

    /// The address of the API.
    pub(crate) fn base(&self) -> &str {
        &self.base
    }

    /// Whether a center answers.
    pub(crate) async fn alive(&self) -> bool {
        self.probe().await.is_ok()
    }

    /// Asks the center for a sign of life.
    pub(crate) async fn probe(&self) -> Result<()> {
        let asked = self.http.get(format!("{}/healthz", self.base));
        let answer = asked.timeout(Duration::from_secs(5)).send().await;
        let answer = answer.map_err(|e| self.broken(&e))?;
        match answer.status() {
            StatusCode::OK => Ok(()),
            status => Err(Failure::unavailable(format!("{} answered {status}", self.base))),
        }
    }

    /// A request with the user's token; `path` begins with `/v1`.
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.base));
        let request = request.bearer_auth(&self.token);
        match &self.tenant {
            Some(tenant) => request.header(TENANT_HEADER, tenant),
            None => request,
        }
    }

    /// Sends a request; an error status becomes the failure that the center names.
    pub(crate) async fn send(&self, request: RequestBuilder) -> Result<Response> {
        let answer = request.send().await.map_err(|e| self.broken(&e))?;
        let status = answer.status();
        if status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(answer);
        }
        let body = self.body(answer).await.unwrap_or_default();
        Err(serde_json::from_slice::<Fault>(&body).map_or_else(
            |_| {
                Failure::internal(format!("{} answered {status}", self.base))
                    .hint("is this the address of a center's API?")
            },
            Failure::from,
        ))
    }

    /// The whole body, if it is not too long.
    pub(crate) async fn body(&self, answer: Response) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        let mut stream = answer.bytes_stream();
        while let Some(part) = stream.next().await {
            let part = part.map_err(|e| self.broken(&e))?;
            if all.len() + part.len() > MAX_ANSWER {
                return Err(Failure::internal("the center's answer is too long"));
            }
            all.extend_from_slice(&part);
        }
        Ok(all)
    }

    /// Asks and reads the JSON of the answer.
    pub(crate) async fn ask<B: Serialize + Sync + ?Sized, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<T> {
        let mut request = self.request(method, path);
        if let Some(b) = body {
            request = request.json(b);
        }
        self.read(path, request).await
    }

    async fn read<T: DeserializeOwned>(&self, path: &str, request: RequestBuilder) -> Result<T> {
        self.parsed(path, self.send(request).await?).await
    }

    async fn parsed<T: DeserializeOwned>(&self, path: &str, answer: Response) -> Result<T> {
        let body = self.body(answer).await?;
        let body: &[u8] = if body.is_empty() { b"null" } else { &body };
        serde_json::from_slice(body).map_err(|e| {
            Failure::internal(format!("the center's answer to {path} is not understood: {e}"))
                .hint("center and command should be of one version")
        })
    }

    /// Reads an object or a list.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let request = self.request(Method::GET, path).timeout(ANSWER_WITHIN);
        self.read(path, request).await
    }

    /// As [`Client::get`], with the event from which on what was read can be followed.
    pub(crate) async fn get_as_of<T: DeserializeOwned>(&self, path: &str) -> Result<(T, String)> {
        let answer = self.send(self.request(Method::GET, path).timeout(ANSWER_WITHIN)).await?;
        let id = answer.headers().get(REVISION_HEADER).and_then(|v| v.to_str().ok());
        let id = id.map(ToOwned::to_owned).ok_or_else(|| {
            Failure::internal("the center does not say with which event its answer was made")
                .hint("center and command should be of one version")
        })?;
        Ok((self.parsed(path, answer).await?, id))
    }

    /// What a request that got no answer means.
    pub(crate) fn broken(&self, e: &reqwest::Error) -> Failure {
        let causes = causes(e);
        if causes.contains("invalid peer certificate") {
            let words = format!(
                "the certificate of {} is not the one in {} ({causes})",
                self.base,
                self.ca.display()
            );
            return Failure::new(Code::Unauthenticated, words).hint(
                "name the certificate of that center with --ca; a center writes it as ca.pem \
                 beside its token",
            );
        }
        if e.is_timeout() {
            return Failure::away(format!("no answer from {} in time", self.base))
                .hint("the center hangs or cannot be reached from here; another's address: --api");
        }
        let words = format!("no answer from {}: {causes}", self.base);
        if e.is_connect() {
            Failure::refused(words)
                .hint("is a center running? start one with: godwit up; another's address: --api")
        } else {
            Failure::away(words)
        }
    }
}

/// The causes below the first, which only repeats the address.
fn causes(e: &reqwest::Error) -> String {
    let mut text = Vec::new();
    let mut next = e.source();
    while let Some(c) = next {
        text.push(c.to_string());
        next = c.source();
    }
    if text.is_empty() { e.to_string() } else { text.join(": ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_advice() {
        let dir = tempfile::tempdir().expect("dir");
        let connect = Connect { config: Some(dir.path().into()), ..Connect::default() };
        let words = Client::open(&connect).expect_err("no certificate").words();
        assert!(words.contains("ca.pem") && words.contains("godwit up"), "{words}");
        let api = Connect { api: Some("http://127.0.0.1:1".into()), ..connect };
        let f = Client::open(&api).expect_err("not https");
        assert_eq!(f.exit, 2);
        assert!(f.words().contains("https://HOST:PORT"));
    }
}
