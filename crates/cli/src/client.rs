//! The center's API over HTTPS.

use std::error::Error as _;
use std::time::Duration;

use futures::StreamExt;
use godwit_cloud::Fault;
use godwit_cloud::daemon::read_token;
use godwit_types::Code;
use reqwest::{Certificate, Method, RequestBuilder, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::args::Connect;
use crate::failure::{Failure, Result};

/// Where a center's API is when nothing else is said.
const DEFAULT_API: &str = "https://127.0.0.1:7700";

/// The longest answer that is read whole, in bytes.
const MAX_ANSWER: usize = 64 << 20;

/// The center, as this command reaches it.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    http: reqwest::Client,
    base: String,
    token: String,
}

/// Nothing to send.
pub(crate) const EMPTY: Option<&()> = None;

impl Client {
    /// Reads address, certificate and token: from flags, environment, then the client's files.
    pub(crate) fn open(connect: &Connect) -> Result<Self> {
        let files = connect.files();
        let base = match &connect.api {
            Some(a) => a.clone(),
            None => std::fs::read_to_string(files.api()).unwrap_or_else(|_| DEFAULT_API.into()),
        };
        let base = base.trim().trim_end_matches('/').to_owned();
        if !base.starts_with("https://") {
            return Err(Failure::usage(format!("'{base}' is no address of an API"))
                .hint("write it as https://HOST:PORT"));
        }
        let ca = connect.ca.clone().unwrap_or_else(|| files.ca());
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
                let file = connect.token_file.clone().unwrap_or_else(|| files.token());
                read_token(&file).map_err(|f| {
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
            .connect_timeout(Duration::from_secs(10))
            .build()
            .map_err(|e| Failure::internal(format!("preparing HTTPS: {}", causes(&e))))?;
        Ok(Self { http, base, token })
    }

    /// The address of the API.
    pub(crate) fn base(&self) -> &str {
        &self.base
    }

    /// Whether a center answers.
    pub(crate) async fn alive(&self) -> bool {
        let asked = self.http.get(format!("{}/healthz", self.base));
        let answer = asked.timeout(Duration::from_secs(5)).send().await;
        answer.is_ok_and(|r| r.status() == StatusCode::OK)
    }

    /// A request with the operator's token; `path` begins with `/v1`.
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.base)).bearer_auth(&self.token)
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
        let answer = self.send(request).await?;
        let body = self.body(answer).await?;
        let body: &[u8] = if body.is_empty() { b"null" } else { &body };
        serde_json::from_slice(body).map_err(|e| {
            Failure::internal(format!("the center's answer to {path} is not understood: {e}"))
                .hint("center and command should be of one version")
        })
    }

    /// Reads an object or a list.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.ask(Method::GET, path, EMPTY).await
    }

    /// What a request that got no answer means.
    pub(crate) fn broken(&self, e: &reqwest::Error) -> Failure {
        let words = format!("no answer from {}: {}", self.base, causes(e));
        if e.is_connect() {
            Failure::unavailable(words)
                .hint("is a center running? start one with: godwit up; another's address: --api")
        } else {
            Failure::unavailable(words)
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
