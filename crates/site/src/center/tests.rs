//! Both ends over a link on loopback.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use godwit_transfer::wire::Versions;
use tokio::sync::Notify;

use super::*;
use crate::tests_previous::{linked, send};

/// A center that answers with what it was sent, after `hold` where that is asked for.
#[derive(Default)]
struct Echo {
    asked: AtomicUsize,
    /// Requests for `/wait` that were begun and are over.
    begun: Notify,
    ended: Arc<Notify>,
}

struct Tells(Arc<Notify>);
impl Drop for Tells {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

struct Frees(Arc<Semaphore>);
impl Drop for Frees {
    fn drop(&mut self) {
        self.0.add_permits(1);
    }
}

#[async_trait]
impl CenterHost for Echo {
    async fn api(
        &self,
        by: &Peer,
        request: ApiRequest,
        mut body: Pieces,
    ) -> Result<(ApiAnswer, Pieces), Fault> {
        self.asked.fetch_add(1, SeqCst);
        let _told = Tells(self.ended.clone());
        let head = |status| ApiAnswer { status, headers: vec![("by".into(), by.name.to_string())] };
        match request.target.as_str() {
            "/wait" => {
                self.begun.notify_one();
                std::future::pending().await
            }
            "/endless" => {
                let pieces = futures::stream::iter([Ok(Bytes::from_static(b"first"))]);
                let told = Tells(self.ended.clone());
                std::mem::forget(_told);
                let rest = pieces.chain(futures::stream::pending()).map(move |piece| {
                    let _while_sent = &told;
                    piece
                });
                Ok((head(200), rest.boxed()))
            }
            "/flood" => {
                let piece = Bytes::from(vec![7; 1 << 20]);
                let pieces = futures::stream::repeat_with(move || Ok(piece.clone()));
                Ok((head(200), pieces.boxed()))
            }
            "/broken" => {
                let pieces = [Ok(Bytes::from_static(b"first")), Err(Fault::internal("broken"))];
                Ok((head(200), futures::stream::iter(pieces).boxed()))
            }
            "/refused" => Ok((head(413), futures::stream::empty().boxed())),
            _ => {
                let mut all = Vec::new();
                while let Some(piece) = body.next().await {
                    all.push(piece.map_err(|f| Fault::invalid(f.message)));
                }
                if let Some(at) = all.iter().position(Result::is_err) {
                    let _ = all.swap_remove(at)?;
                }
                Ok((head(200), futures::stream::iter(all).boxed()))
            }
        }
    }
}

fn get(target: &str) -> ApiRequest {
    let headers = vec![("authorization".into(), "Bearer very-secret".into())];
    ApiRequest { method: "POST".into(), target: target.into(), headers, length: None }
}

async fn all(mut pieces: Pieces) -> Result<Vec<u8>, Fault> {
    let mut out = Vec::new();
    while let Some(piece) = pieces.next().await {
        out.extend_from_slice(&piece?);
    }
    Ok(out)
}

fn body(text: &'static [u8]) -> Pieces {
    futures::stream::iter([Ok(Bytes::from_static(text))]).boxed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_goes_to_the_center_and_back_in_pieces_and_ends_with_its_caller() {
    let (near, far, _endpoints) = linked(Versions::OURS, Versions::OURS).await;
    let echo = Arc::new(Echo::default());
    tokio::spawn(serve_site(far, echo.clone()));

    let long: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 9) as u8).collect();
    let parts: Vec<_> = long.chunks(700_001).map(|c| Ok(Bytes::copy_from_slice(c))).collect();
    let sent = futures::stream::iter(parts);
    let (head, pieces) = ask_center(&near, get("/v1/x?y=z"), sent, ()).await.expect("answered");
    assert_eq!((head.status, head.headers[0].1.as_str()), (200, "cafe"), "as its certificate says");
    assert_eq!(all(pieces).await.expect("whole"), long);

    // One that is refused while its body still comes.
    let endless = futures::stream::repeat_with(|| Ok(Bytes::from_static(&[7; 4096])));
    let (head, pieces) = ask_center(&near, get("/refused"), endless, ()).await.expect("answered");
    assert_eq!((head.status, all(pieces).await.expect("empty").len()), (413, 0));

    // A body that breaks off is no short body, either way.
    let cut =
        futures::stream::iter([Ok(Bytes::from_static(b"half")), Err(Fault::internal("gone"))]);
    let f = ask_center(&near, get("/v1/x"), cut, ()).await.map(drop).expect_err("cut");
    assert!(f.message.contains("the body broke off"), "{f}");
    let (_, pieces) = ask_center(&near, get("/broken"), body(b""), ()).await.expect("answered");
    let f = all(pieces).await.expect_err("cut");
    assert!(f.message.contains("the body broke off"), "{f}");

    // Whoever lets go of it ends it at the center: before the answer, and in its midst.
    while tokio::time::timeout(Duration::from_millis(50), echo.ended.notified()).await.is_ok() {}
    let asking = tokio::spawn({
        let near = near.clone();
        async move { ask_center(&near, get("/wait"), body(b"x"), ()).await.map(drop) }
    });
    echo.begun.notified().await;
    asking.abort();
    echo.ended.notified().await;
    let (_, mut pieces) =
        ask_center(&near, get("/endless"), body(b""), ()).await.expect("answered");
    assert_eq!(pieces.next().await.expect("a piece").expect("good"), "first");
    drop(pieces);
    echo.ended.notified().await;

    // What is out of bounds is not sent; what a site sends all the same is refused in words.
    let before = echo.asked.load(SeqCst);
    for target in ["v1".to_owned(), format!("/{}", "x".repeat(9000))] {
        let f =
            ask_center(&near, get(&target), body(b""), ()).await.map(drop).expect_err("refused");
        assert_eq!(f.code, Code::Invalid, "{f}");
    }
    let long = ApiRequest { method: "X".repeat(17), ..get("/v1") };
    for sent in [
        postcard::to_stdvec(&CenterRequest::Api(long)).expect("bytes"),
        vec![9, 9, 9],
        vec![0; 100_000],
    ] {
        let mut lane = near.open(LaneKind::Pipe, Priority::State).await.expect("a lane");
        send(&mut lane, &sent).await;
        let (_to, mut from) = lane.split();
        let answer: Result<ApiAnswer, Fault> =
            recv_at_most(&mut from, MAX_HEAD).await.expect("one");
        assert_eq!(answer.expect_err("refused").code, Code::Invalid);
    }
    assert_eq!(echo.asked.load(SeqCst), before, "nothing of it came through");
    assert!(!format!("{:?}", get("/v1")).contains("secret"), "a token is in no log");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_site_has_so_many_requests_at_its_center_and_no_more() {
    let (near, far, _endpoints) = linked(Versions::OURS, Versions::OURS).await;
    let echo = Arc::new(Echo::default());
    tokio::spawn(serve_site(far, echo.clone()));
    let mut open = Vec::new();
    for _ in 0..API_AT_ONCE {
        let (_, pieces) =
            ask_center(&near, get("/endless"), body(b""), ()).await.expect("answered");
        open.push(pieces);
    }
    let f = ask_center(&near, get("/v1"), body(b""), ()).await.map(drop).expect_err("one too many");
    assert_eq!(f.code, Code::Unavailable);
    assert!(f.message.contains("site 'cafe' has 128 requests"), "{f}");
    open.pop();
    echo.ended.notified().await;
    // The place is free a moment after the request has ended.
    let answered = async {
        while ask_center(&near, get("/v1"), body(b""), ()).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), answered).await.expect("there is room again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_read_is_not_in_the_way_of_others_and_is_left() {
    let (near, far, _endpoints) = linked(Versions::OURS, Versions::OURS).await;
    tokio::spawn(serve_site(far, Arc::new(Echo::default())));
    let freed = Arc::new(Semaphore::new(0));
    let mut floods = Vec::new();
    let began = Instant::now();
    for _ in 0..24 {
        let place = Frees(freed.clone());
        let flood = ask_center(&near, get("/flood"), body(b""), place).await.expect("answered");
        floods.push(flood.1);
    }
    // Others are answered, however much waits unread.
    let long = vec![3; 3 << 20];
    let sent = futures::stream::iter([Ok(Bytes::from(long.clone()))]);
    let (_, pieces) = ask_center(&near, get("/v1"), sent, ()).await.expect("answered");
    assert_eq!(all(pieces).await.expect("whole"), long);
    // Nor does one that reads wait for those that do not.
    let mut read = floods.pop().expect("one");
    for _ in 0..100 {
        assert!(!read.next().await.expect("a piece").expect("good").is_empty());
    }
    assert!(began.elapsed() < READ_WITHIN, "it was not because they were given up");
    drop(read);
    let all_free = tokio::time::timeout(Duration::from_secs(60), freed.acquire_many(24)).await;
    all_free.expect("they are given up").expect("open").forget();
    // Each hears that it is no whole answer.
    for flood in floods {
        let f = all(flood).await.expect_err("cut");
        assert!(f.message.contains("was not read in time"), "{f}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_of_protocol_3_are_refused_in_words_and_not_asked() {
    let three = Versions { min: 1, max: 3 };
    // The center is the older one: it takes no lanes at all, and would never answer.
    let (near, _far, _endpoints) = linked(three, Versions::OURS).await;
    let f = ask_center(&near, get("/v1"), body(b""), ()).await.map(drop).expect_err("too old");
    assert_eq!(f.code, Code::Conflict);
    assert!(f.message.contains("'center' speaks protocol 3, and 'api request' needs 4"), "{f}");
    assert_eq!(f.hint.as_deref(), Some("update 'center'"));
    // The site is: it asks all the same.
    let (near, far, _endpoints) = linked(Versions::OURS, three).await;
    let echo = Arc::new(Echo::default());
    tokio::spawn(serve_site(far, echo.clone()));
    let mut lane = near.open(LaneKind::Pipe, Priority::State).await.expect("a lane");
    let sent = postcard::to_stdvec(&CenterRequest::Api(get("/v1"))).expect("bytes");
    send(&mut lane, &sent).await;
    let (_to, mut from) = lane.split();
    let answer: Result<ApiAnswer, Fault> = recv_at_most(&mut from, MAX_HEAD).await.expect("one");
    let f = answer.expect_err("too old");
    assert!(f.message.contains("'cafe' speaks protocol 3"), "{f}");
    assert_eq!(echo.asked.load(SeqCst), 0);
}
