//! What a site serves, its link, and the center's own router behind it.

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
    let front = router(name("cafe"), center_link);
    Place { _dir: dir, registry, front, center, linked, _endpoints: [at_center, at_site] }
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

    async fn as_operator(&self, method: Method, path: &str, body: &str) -> Response {
        let headers = [("authorization", "Bearer secret"), ("content-type", "application/json")];
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
    let (status, words) = text(p.as_operator(Method::POST, "/v1/vms", &big).await).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{words}");
    // What needs a connection of its own is refused in words.
    let headers = [("authorization", "Bearer secret"), ("upgrade", "websocket")];
    let (status, words) = text(p.ask(Method::GET, "/v1/vms/x/view", &headers, "").await).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(fault(&words).message.contains("do not come through site 'cafe'"), "{words}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_of_events_comes_through_as_it_happens_and_ends_with_the_link() {
    let p = place().await;
    let answer = p.as_operator(Method::GET, "/v1/events", "").await;
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(answer.headers()["content-type"], "text/event-stream");
    let mut events = answer.into_body().into_data_stream();
    let _ = p.user("acme", "ann", Role::Member);
    let vm = crate::registry::tests::vm("report");
    p.registry.vm_add(&vm, None).expect("added");
    let mut seen = String::new();
    while !seen.contains("report") {
        let piece = events.next().await.expect("a piece").expect("good");
        seen.push_str(std::str::from_utf8(&piece).expect("text"));
    }
    // Where the link is gone the stream breaks off, and who asks hears why.
    let link = p.linked.send_replace(None).expect("a link");
    let (status, words) = text(p.as_operator(Method::GET, "/v1/vms", "").await).await;
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
    let p = place().await;
    let wrong = [("authorization", "Bearer gwt-wrong")];
    for n in 0..WRONG_TOKENS {
        let status = p.ask(Method::GET, "/v1/vms", &wrong, "").await.status();
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{n}");
    }
    let (status, words) = text(p.as_operator(Method::GET, "/v1/vms", "").await).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(fault(&words).message.contains("too many wrong tokens came from your address"));

    // A site that does not count, as a stolen one would, is stopped by its center.
    let link = p.linked.borrow().clone().expect("a link");
    let ask = async |token: &str| {
        let asked = ApiRequest {
            method: "GET".into(),
            target: "/v1/vms".into(),
            headers: vec![("authorization".into(), format!("Bearer {token}"))],
        };
        let answer = ask_center(&link, asked, futures::stream::empty()).await.expect("answered");
        answer.0.status
    };
    let mut heard = 0;
    while ask("gwt-wrong").await == 401 {
        heard += 1;
        assert!(heard <= 60, "it is never stopped");
    }
    assert_eq!(heard, 60 - WRONG_TOKENS);
    assert_eq!(ask("secret").await, 503, "whatever it shows");
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
