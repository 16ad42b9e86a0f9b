//! An API server for unit tests: answers what the test says, keeps what it was asked, and has no news for watches.

use std::convert::Infallible;
use std::future::pending;
use std::sync::{Arc, Mutex};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use kube::{Client, Config};
use tokio::net::TcpListener;

/// What comes back to `GET /api/v1/nodes`, say: JSON, or a status code without any.
type Answer = dyn Fn(&str) -> Result<String, u16> + Send + Sync;

pub(crate) struct FakeApi {
    pub(crate) client: Client,
    asked: Arc<Mutex<Vec<String>>>,
}

impl FakeApi {
    /// Serves until the test ends.
    pub(crate) async fn serve(answer: impl Fn(&str) -> Result<String, u16> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let (asked, answer): (Arc<Mutex<Vec<String>>>, Arc<Answer>) = (Arc::default(), Arc::new(answer));
        let kept = asked.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (kept, answer) = (kept.clone(), answer.clone());
                let service = service_fn(move |request| answered(request, kept.clone(), answer.clone()));
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        let uri = format!("http://{address}").parse().expect("a URI");
        Self { client: Client::try_from(Config::new(uri)).expect("a client"), asked }
    }

    /// What was asked since this was asked last, but for watches: `PATCH /api/v1/namespaces/kube-system/services/a`, say.
    pub(crate) fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.asked.lock().expect("no test holds it"))
    }
}

async fn answered(
    request: Request<Incoming>,
    asked: Arc<Mutex<Vec<String>>>,
    answer: Arc<Answer>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    if request.uri().query().is_some_and(|query| query.contains("watch=true")) {
        return pending().await;
    }
    let what = format!("{} {}", request.method(), request.uri().path());
    let _ = request.into_body().collect().await;
    let (status, body) = match answer(&what) {
        Ok(json) => (200, json),
        Err(code) => {
            let reason = if code == 404 { "NotFound" } else { "Forbidden" };
            (code, format!(r#"{{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"{reason}","message":"no","code":{code}}}"#))
        }
    };
    asked.lock().expect("no test holds it").push(what);
    Ok(Response::builder().status(status).body(Full::new(body.into())).expect("a status code written in a test"))
}

/// A list of these objects.
pub(crate) fn list(items: &[&str]) -> String {
    format!(r#"{{"apiVersion":"v1","kind":"List","metadata":{{"resourceVersion":"1"}},"items":[{}]}}"#, items.join(","))
}
