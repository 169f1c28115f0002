use axum::Router;
use axum::http::Method;
use axum::routing::get;
use tower::ServiceExt;

use godwit_transfer::keys::TokenState;

use super::*;
use crate::registry::Registry;

pub(crate) struct NoGate;
impl Gatekeeper for NoGate {
    fn invite(&self, site: &Name, _: SiteKind, _: u64) -> Result<String, Fault> {
        Ok(format!("token-for-{site}"))
    }
    fn tokens(&self) -> Vec<TokenInfo> {
        let token = |id: &str, expires, state| TokenInfo {
            id: id.into(),
            secret: godwit_types::Hash::of(b"secret"),
            site: Name::new("cafe").expect("name"),
            kind: SiteKind::Ap,
            expires,
            state,
        };
        let used = TokenState::Used { key: godwit_types::Hash::of(b"key") };
        let ahead = u64::from(u32::MAX);
        vec![
            token("old", 1, TokenState::Unused),
            token("new", ahead, TokenState::Unused),
            token("used", ahead - 1, used),
        ]
    }
    fn withdraw(&self, _: &str) -> Result<(), Fault> {
        Ok(())
    }
    fn revoke(&self, _: &Name) -> Result<Revocations, Fault> {
        Ok(Revocations::default())
    }
}

/// All that a center serves.
pub(crate) fn whole(api: &Api) -> Router {
    api.serve(api.v1().and(api.metrics()).and(api.health()))
}

fn api() -> (tempfile::TempDir, Router) {
    let (dir, api) = center();
    (dir, whole(&api))
}

fn center() -> (tempfile::TempDir, Api) {
    let dir = tempfile::tempdir().expect("dir");
    let reg = Arc::new(Registry::open(&dir.path().join("r.redb")).expect("open"));
    let authority = godwit_transfer::Authority::create(&dir.path().join("authority"));
    let authority = Arc::new(authority.expect("authority"));
    let c = Controller::new(reg, authority);
    (dir, Api::new(c, Arc::new(NoGate), "secret"))
}

async fn send(
    router: &Router,
    method: Method,
    path: &str,
    token: Option<&str>,
    body: Vec<u8>,
) -> (StatusCode, String) {
    let mut r = axum::http::Request::builder().method(method).uri(path);
    if let Some(t) = token {
        r = r.header(AUTHORIZATION, format!("Bearer {t}"));
    }
    let r = r.header(CONTENT_TYPE, "application/json").body(Body::from(body)).expect("request");
    let answer = router.clone().oneshot(r).await.expect("answer");
    let status = answer.status();
    let bytes = axum::body::to_bytes(answer.into_body(), 1 << 22).await.expect("body");
    (status, String::from_utf8_lossy(&bytes).into_owned())
}

/// As [`send`] with a token, in the type that the path wants.
pub(super) async fn send_as(
    router: &Router,
    method: Method,
    path: &str,
    token: &str,
    body: &str,
) -> (StatusCode, String) {
    let kind = if body == "GWSA" { "application/octet-stream" } else { "application/json" };
    let r = axum::http::Request::builder()
        .method(method)
        .uri(path)
        .header(AUTHORIZATION, format!("Bearer {token}"))
        .header(CONTENT_TYPE, kind)
        .body(Body::from(body.to_owned()))
        .expect("request");
    let answer = router.clone().oneshot(r).await.expect("answer");
    let status = answer.status();
    let bytes = axum::body::to_bytes(answer.into_body(), 1 << 22).await.expect("body");
    (status, String::from_utf8_lossy(&bytes).into_owned())
}

pub(crate) fn fault(text: &str) -> Fault {
    serde_json::from_str(text).expect("a fault")
}

#[tokio::test]
async fn a_room_above_adds_pages_that_know_who_asks() {
    let (_d, api) = center();
    let page = get(|who: axum::Extension<Principal>| async move { who.user.to_string() });
    let pages = Routes::new()
        .guarded(Router::new().route("/pages/me", page))
        .open(Router::new().route("/pages/login", get(|| async { "who are you?" })));
    let r = api.serve(api.v1().and(pages));
    let ask = |path, token| send(&r, Method::GET, path, token, vec![]);
    assert_eq!(ask("/pages/me", None).await.0, StatusCode::UNAUTHORIZED);
    assert_eq!(ask("/pages/me", Some("secret")).await, (StatusCode::OK, "operator".into()));
    assert_eq!(ask("/pages/login", None).await, (StatusCode::OK, "who are you?".into()));
    // The API is there as ever, and what nobody added is not.
    assert_eq!(ask("/v1/vms", None).await.0, StatusCode::UNAUTHORIZED);
    assert_eq!(ask("/v1/vms", Some("secret")).await.0, StatusCode::OK);
    assert_eq!(ask("/healthz", None).await.0, StatusCode::UNAUTHORIZED);
    assert_eq!(ask("/metrics", Some("secret")).await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn nothing_but_health_is_answered_to_a_stranger() {
    let (_d, r) = api();
    assert_eq!(send(&r, Method::GET, "/healthz", None, vec![]).await.0, StatusCode::OK);
    for path in ["/v1/vms", "/metrics", "/v1/openapi.json", "/nowhere"] {
        for token in [None, Some("wrong"), Some("")] {
            let (status, body) = send(&r, Method::GET, path, token, vec![]).await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{path}");
            assert!(fault(&body).hint.is_some());
        }
        let (status, _) = send(&r, Method::GET, path, Some("secret"), vec![]).await;
        let want = if path == "/nowhere" { StatusCode::NOT_FOUND } else { StatusCode::OK };
        assert_eq!(status, want, "{path}");
    }
}

#[tokio::test]
async fn bad_input_is_refused_with_a_reason() {
    let (_d, r) = api();
    let post =
        |path: &'static str, body: Vec<u8>| send(&r, Method::POST, path, Some("secret"), body);
    let (status, body) = post("/v1/vms", vec![b' '; MAX_BODY + 1]).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    assert!(fault(&body).message.contains("over 1048576 bytes"), "{body}");
    let (status, body) = post("/v1/vms", br#"{"name":"../etc","image":"tiny"}"#.to_vec()).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(fault(&body).message.contains("'../etc' is not a valid name"), "{body}");
    let (status, body) = post("/v1/vms", br#"{"nmae":"a"}"#.to_vec()).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(fault(&body).message.contains("unknown field `nmae`"), "{body}");
    let (status, body) = post("/v1/vms", vec![]).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(fault(&body).message, "name either an image or a substrate");
    let (status, body) = post("/v1/vms/%2e%2e%2fetc/start", vec![]).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    assert_eq!(fault(&body).message, "no machine '../etc'");
    let (status, body) =
        post("/v1/tokens", br#"{"site":"cafe","lifetime_s":99999999}"#.to_vec()).await;
    assert_eq!((status, fault(&body).code), (StatusCode::BAD_REQUEST, Code::Invalid));
    let (status, body) = post("/v1/tokens", br#"{"site":"cafe"}"#.to_vec()).await;
    assert_eq!(
        (status, body.as_str()),
        (StatusCode::CREATED, r#"{"site":"cafe","token":"token-for-cafe"}"#)
    );
    for (method, path) in [
        (Method::GET, "/v1/ops/7"),
        // Bytes that are no text, and a parameter that would be overlooked.
        (Method::GET, "/v1/vms/%ff"),
        (Method::POST, "/v1/vms?dry_runn=true"),
        (Method::GET, "/v1/vms?site=..%2fx"),
    ] {
        let (status, body) = send(&r, method, path, Some("secret"), vec![]).await;
        assert_eq!((status, fault(&body).code), (StatusCode::BAD_REQUEST, Code::Invalid), "{path}");
    }
    let (status, body) = send(&r, Method::PUT, "/v1/vms", Some("secret"), vec![]).await;
    assert_eq!((status, fault(&body).code), (StatusCode::METHOD_NOT_ALLOWED, Code::Invalid));
}

#[tokio::test]
async fn tokens_are_listed_with_what_became_of_them_and_without_their_secrets() {
    let (_d, r) = api();
    let (status, body) = send(&r, Method::GET, "/v1/tokens", Some("secret"), vec![]).await;
    assert_eq!(status, StatusCode::OK);
    let all: Vec<Token> = serde_json::from_str(&body).expect("tokens");
    let seen: Vec<_> = all.iter().map(|t| (t.id.as_str(), t.state)).collect();
    let wanted = [("new", TokenUse::Unused), ("used", TokenUse::Used), ("old", TokenUse::Expired)];
    assert_eq!(seen, wanted);
    assert!(!body.contains(&godwit_types::Hash::of(b"secret").to_string()), "{body}");
}

#[tokio::test]
async fn a_type_may_have_parameters_and_must_be_the_right_one() {
    let (_d, r) = api();
    for (kind, taken) in [
        ("application/json; charset=utf-8", true),
        ("APPLICATION/JSON", true),
        ("text/plain", false),
        ("application/jsonx", false),
    ] {
        let request = axum::http::Request::builder()
            .method(Method::POST)
            .uri("/v1/tokens")
            .header(AUTHORIZATION, "Bearer secret")
            .header(CONTENT_TYPE, kind)
            .body(Body::from(r#"{"site":"cafe"}"#))
            .expect("request");
        let answer = r.clone().oneshot(request).await.expect("answer");
        let want = if taken { StatusCode::CREATED } else { StatusCode::BAD_REQUEST };
        assert_eq!(answer.status(), want, "{kind}");
    }
}

#[test]
fn the_description_that_is_checked_in_is_the_one_of_this_code() {
    let now = openapi().to_pretty_json().expect("json") + "\n";
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
    if std::env::var_os("GODWIT_UPDATE_OPENAPI").is_some() {
        std::fs::write(path, &now).expect("write");
    }
    let kept = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        kept == now,
        "openapi.json is not up to date; run the test once with GODWIT_UPDATE_OPENAPI=1"
    );
}
