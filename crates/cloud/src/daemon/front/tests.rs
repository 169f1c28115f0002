//! What a site serves, its link, and the center's own router behind it.

use std::time::Duration;

use axum::http::header::AUTHORIZATION;
use futures::StreamExt;
use godwit_site::serve_site;
use godwit_transfer::{Authority, Endpoint, EndpointOptions, PendingIdentity};
use godwit_types::SiteKind;
use tower::ServiceExt;

use super::super::by_site::BySite;
use super::*;
use crate::access::{Principal, Role};
use crate::api::tests::{NoGate, fault, whole};
use crate::api::{Api, REVISION_HEADER, TENANT_HEADER};
use crate::controller::Controller;
use crate::registry::{Drawn, Registry, TenantRecord};

struct Place {
    _dir: tempfile::TempDir,
    registry: Arc<Registry>,
    /// What the site serves.
    front: axum::Router,
    front_of: Arc<Front>,
    /// What the center does.
    center: axum::Router,
    linked: watch::Sender<Option<Link>>,
    _endpoints: [Endpoint; 2],
}

fn name(text: &str) -> Name {
    Name::new(text).expect("name")
}

async fn place() -> Place {
    let dir = tempfile::tempdir().expect("dir");
    let registry = Arc::new(Registry::open(&dir.path().join("r.redb")).expect("open"));
    let authority = Arc::new(Authority::create(&dir.path().join("authority")).expect("authority"));
    let bind = |who: &str, kind| {
        let pending = PendingIdentity::make(&name(who), kind).expect("key");
        let der = authority.issue(pending.request(), &name(who), kind).expect("issue");
        let identity = pending.complete(&der, authority.certificate()).expect("identity");
        let (any, trust) = ("127.0.0.1:0".parse().expect("address"), authority.trust().clone());
        Endpoint::bind(any, identity, trust, EndpointOptions::default()).expect("bind")
    };
    let (at_center, at_site) = (bind("center", SiteKind::Center), bind("cafe", SiteKind::Ap));
    let address = at_center.local_address().expect("address");
    let near = at_site.connect(address, None).await.expect("a link");
    let far = at_center.accept().await.expect("a link");
    let controller = Controller::new(registry.clone(), authority);
    let center = whole(&Api::new(controller, Arc::new(NoGate), "secret"));
    tokio::spawn(serve_site(far, Arc::new(BySite { router: center.clone() })));
    let (linked, center_link) = watch::channel(Some(near));
    let front_of = Arc::new(Front::new(name("cafe"), center_link));
    let front = routes(front_of.clone());
    let _endpoints = [at_center, at_site];
    Place { _dir: dir, registry, front, front_of, center, linked, _endpoints }
}

impl Place {
    async fn ask(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Response {
        let mut r = axum::http::Request::builder().method(method).uri(path);
        for (name, value) in headers {
            r = r.header(*name, *value);
        }
        let mut r = r.body(Body::from(body.to_owned())).expect("request");
        let from: SocketAddr = "192.0.2.7:5000".parse().expect("address");
        r.extensions_mut().insert(ConnectInfo(from));
        self.front.clone().oneshot(r).await.expect("answer")
    }

    async fn by(&self, token: &str, method: Method, path: &str, body: &str) -> Response {
        let headers = [("authorization", token), ("content-type", "application/json")];
        self.ask(method, path, &headers, body).await
    }

    /// A token of a new user.
    fn user(&self, tenant: &str, n: &str, role: Role) -> String {
        let (me, tenant) = (Principal::operator(), name(tenant));
        if self.registry.people().tenant(&tenant).is_err() {
            self.registry
                .people()
                .tenant_add(&me, &TenantRecord::new(tenant.clone()))
                .expect("tenant");
        }
        let user = self.registry.people().user_add(&me, &tenant, &name(n), role).expect("user");
        let drawn = Drawn::new(user.id, role, None);
        self.registry.people().token_add(&me, &drawn.record).expect("token");
        format!("Bearer {}", drawn.text)
    }
}

async fn text(answer: Response) -> (StatusCode, String) {
    let status = answer.status();
    let bytes = axum::body::to_bytes(answer.into_body(), 1 << 22).await.expect("body");
    (status, String::from_utf8_lossy(&bytes).into_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn people_at_a_site_ask_the_center_as_themselves_and_the_site_as_nobody() {
    let p = place().await;
    // Without a token a site is nobody.
    let (status, words) = text(p.ask(Method::GET, "/v1/vms", &[], "").await).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED, "{words}");
    assert_eq!(text(p.ask(Method::GET, "/healthz", &[], "").await).await.0, StatusCode::OK);

    // Each is who the token says, with the role and the tenant of that one, and no more.
    let viewer = p.user("acme", "vic", Role::Viewer);
    let admin = p.user("acme", "adm", Role::Admin);
    let as_viewer = [("authorization", viewer.as_str())];
    let answer = p.ask(Method::GET, "/v1/vms", &as_viewer, "").await;
    assert!(answer.headers().contains_key(REVISION_HEADER));
    assert_eq!(text(answer).await, (StatusCode::OK, "[]".into()));
    let new = r#"{"name":"bob","role":"member"}"#;
    let json = ("content-type", "application/json");
    let create = async |token: &str| {
        let headers = [("authorization", token), json];
        text(p.ask(Method::POST, "/v1/users", &headers, new).await).await
    };
    let (status, words) = create(&viewer).await;
    assert_eq!(status, StatusCode::FORBIDDEN, "{words}");
    let (status, words) = create(&admin).await;
    assert!(status.is_success(), "{status} {words}");
    let foreign = [("authorization", viewer.as_str()), (TENANT_HEADER, "default")];
    let (status, words) = text(p.ask(Method::GET, "/v1/vms", &foreign, "").await).await;
    assert_eq!(status, StatusCode::NOT_FOUND, "the header came through: {words}");

    // The log says by which site it came, and of whoever asks the center itself no site.
    let direct = axum::http::Request::post("/v1/tenants")
        .header(AUTHORIZATION, "Bearer secret")
        .header("content-type", "application/json")
        .body(Body::from(r#"{"name":"other"}"#))
        .expect("request");
    assert!(p.center.clone().oneshot(direct).await.expect("answer").status().is_success());
    let log = p.registry.audit().entries(100, 0, |_| true).expect("log");
    let by = |action: &str| {
        let entry = log.iter().rfind(|e| e.action == action).unwrap_or_else(|| panic!("{action}"));
        (entry.user.as_str(), entry.by.as_ref().map(Name::as_str))
    };
    assert_eq!(by("user create"), ("adm", Some("cafe")));
    assert_eq!(by("request"), ("vic", Some("cafe")), "what was refused");
    assert_eq!(by("tenant create"), ("operator", None));
    p.registry.audit().verify().expect("whole");

    // A body over the center's bound is refused by the center.
    let big = "x".repeat(crate::api::MAX_BODY + 1);
    let (status, words) = text(p.by(&admin, Method::POST, "/v1/vms", &big).await).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{words}");
    // What needs a connection of its own is refused in words.
    let headers = [("authorization", viewer.as_str()), ("upgrade", "websocket")];
    let (status, words) = text(p.ask(Method::GET, "/v1/vms/x/view", &headers, "").await).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(fault(&words).message.contains("do not come through site 'cafe'"), "{words}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_site_sees_the_tokens_that_pass_so_no_operator_is_accepted_there_and_no_token_made() {
    let p = place().await;
    let root = p.user("default", "root", Role::Operator);
    for token in ["Bearer secret", &root] {
        for (method, path) in [(Method::GET, "/v1/vms"), (Method::POST, "/v1/tokens")] {
            let (status, words) = text(p.by(token, method, path, "{}").await).await;
            assert_eq!(status, StatusCode::FORBIDDEN, "{path}: {words}");
            let f = fault(&words);
            assert!(f.message.contains("not heard by way of site 'cafe'"), "{words}");
            assert!(f.hint.is_some_and(|h| h.contains("ask the center itself")), "{words}");
        }
    }
    let admin = p.user("acme", "adm", Role::Admin);
    let new = r#"{"user":"adm"}"#;
    for path in ["/v1/api-tokens", "/v1/tokens"] {
        let (status, words) = text(p.by(&admin, Method::POST, path, new).await).await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{words}");
        let words = fault(&words).message;
        assert!(words.contains("not made by way of site 'cafe'"), "{words}");
    }
    let (status, words) = text(p.by(&admin, Method::GET, "/v1/api-tokens", "").await).await;
    assert_eq!(status, StatusCode::OK, "they may be looked at: {words}");
    let log = p.registry.audit().entries(100, 0, |_| true).expect("log");
    let refused = log.iter().find(|e| e.user.as_str() == "operator" && e.action == "request");
    let refused = refused.expect("an operator's token that a site showed is in the log");
    assert_eq!(refused.by.as_ref().map(Name::as_str), Some("cafe"));
    // At the center itself both are heard.
    for token in ["Bearer secret", &root] {
        let asked = axum::http::Request::get("/v1/vms").header(AUTHORIZATION, token);
        let asked = asked.body(Body::empty()).expect("request");
        let status = p.center.clone().oneshot(asked).await.expect("answer").status();
        assert_eq!(status, StatusCode::OK);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_address_has_so_many_requests_at_once() {
    let p = place().await;
    let viewer = p.user("acme", "vic", Role::Viewer);
    let front = p.front_of.clone();
    let here = one_caller("192.0.2.7".parse().expect("address"));
    let mut places = Vec::new();
    for _ in 0..AT_ONCE_OF_ONE - 1 {
        places.push(CallersPlace::take(&front.callers, here).expect("a place"));
    }
    let events = p.by(&viewer, Method::GET, "/v1/events", "").await;
    assert_eq!(events.status(), StatusCode::OK);
    let (status, words) = text(p.by(&viewer, Method::GET, "/v1/vms", "").await).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(fault(&words).message.contains("your address has 16 requests"), "{words}");
    assert!(CallersPlace::take(&front.callers, "192.0.2.8".parse().expect("address")).is_some());
    // Whoever lets go of its stream has its place back.
    drop(events);
    let answered = async {
        while p.by(&viewer, Method::GET, "/v1/vms", "").await.status() != StatusCode::OK {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), answered).await.expect("there is room again");
    drop(places);
    let none = async {
        while !front.callers.lock().expect("lock").is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), none).await.expect("nobody is kept in mind");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_of_events_comes_through_as_it_happens_and_ends_with_the_link() {
    let p = place().await;
    let ann = p.user("default", "ann", Role::Member);
    let answer = p.by(&ann, Method::GET, "/v1/events", "").await;
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(answer.headers()["content-type"], "text/event-stream");
    let mut events = answer.into_body().into_data_stream();
    let vm = crate::registry::tests::vm("report");
    p.registry.vm_add(&vm, None).expect("added");
    let mut seen = String::new();
    while !seen.contains("report") {
        let piece = events.next().await.expect("a piece").expect("good");
        seen.push_str(std::str::from_utf8(&piece).expect("text"));
    }
    // Where the link is gone the stream breaks off, and who asks hears why.
    let link = p.linked.send_replace(None).expect("a link");
    let (status, words) = text(p.by(&ann, Method::GET, "/v1/vms", "").await).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(fault(&words).message.contains("site 'cafe' does not reach its center"), "{words}");
    link.close("a test");
    while let Some(piece) = events.next().await {
        if piece.is_err() {
            return;
        }
    }
    panic!("the stream ended as if it were whole");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_tokens_are_counted_by_address_and_by_site() {
    let p = Arc::new(place().await);
    let viewer = p.user("acme", "vic", Role::Viewer);
    // A good one, and none, are not counted, nor is what could not be asked.
    let link = p.linked.send_replace(None).expect("a link");
    for _ in 0..WRONG_TOKENS {
        let status = p.by("Bearer gwt-wrong", Method::GET, "/v1/vms", "").await.status();
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    }
    p.linked.send_replace(Some(link.clone()));
    for _ in 0..=WRONG_TOKENS {
        let status = p.by(&viewer, Method::GET, "/v1/vms", "").await.status();
        assert_eq!(status, StatusCode::OK);
        let status = p.ask(Method::GET, "/v1/vms", &[], "").await.status();
        assert_eq!(status, StatusCode::UNAUTHORIZED);
    }
    // Many at once do not pass together.
    let mut heard = 0;
    let mut at_once = tokio::task::JoinSet::new();
    for _ in 0..4 * WRONG_TOKENS {
        let p = p.clone();
        at_once.spawn(async move {
            p.by("Bearer gwt-wrong", Method::GET, "/v1/vms", "").await.status()
        });
    }
    while let Some(status) = at_once.join_next().await {
        heard += u32::from(status.expect("answered") == StatusCode::UNAUTHORIZED);
    }
    assert!(heard <= WRONG_TOKENS, "{heard}");
    while p.by("Bearer gwt-wrong", Method::GET, "/v1/vms", "").await.status() == 401 {
        heard += 1;
    }
    assert_eq!(heard, WRONG_TOKENS);
    let (status, words) = text(p.by(&viewer, Method::GET, "/v1/vms", "").await).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(fault(&words).message.contains("too many wrong tokens came from your address"));

    // A site that does not count, as a stolen one would, is stopped by its center.
    let ask = async |token: &str| {
        let asked = ApiRequest {
            method: "GET".into(),
            target: "/v1/vms".into(),
            headers: vec![("authorization".into(), token.to_owned())],
            length: None,
        };
        let answer = ask_center(&link, asked, futures::stream::empty(), ()).await;
        answer.expect("answered").0.status
    };
    while ask("Bearer gwt-wrong").await == 401 {
        heard += 1;
        assert!(heard <= 60, "it is never stopped");
    }
    assert_eq!((heard, ask("Bearer gwt-wrong").await), (60, 503));
    assert_eq!(ask(&viewer).await, 200, "others of the site do not lock a good token out");
    let direct = axum::http::Request::get("/v1/vms").header(AUTHORIZATION, "Bearer secret");
    let direct = direct.body(Body::empty()).expect("request");
    let status = p.center.clone().oneshot(direct).await.expect("answer").status();
    assert_eq!(status, StatusCode::OK, "who asks the center itself is heard");
}

#[test]
fn addresses_that_one_caller_can_choose_count_as_one() {
    let ip = |text: &str| text.parse::<IpAddr>().expect("address");
    assert_eq!(one_caller(ip("2001:db8::1")), one_caller(ip("2001:db8::ffff:2")));
    assert_ne!(one_caller(ip("2001:db8::1")), one_caller(ip("2001:db8:0:1::1")));
    assert_eq!(one_caller(ip("::ffff:192.0.2.7")), ip("192.0.2.7"));
}
