//! An API server for unit tests: returns the test's responses, records requests, and never sends watch events.

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

/// Returns the response to a request such as `GET /api/v1/nodes`: JSON, or an error status code.
type Respond = dyn Fn(&str) -> Result<String, u16> + Send + Sync;

pub(crate) struct FakeApi {
    pub(crate) client: Client,
    requests: Arc<Mutex<Vec<String>>>,
}

impl FakeApi {
    /// Starts a server that runs until the test ends.
    pub(crate) async fn serve(respond: impl Fn(&str) -> Result<String, u16> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let (requests, respond): (Arc<Mutex<Vec<String>>>, Arc<Respond>) = (Arc::default(), Arc::new(respond));
        let recorded = requests.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (recorded, respond) = (recorded.clone(), respond.clone());
                let service = service_fn(move |request| handle(request, recorded.clone(), respond.clone()));
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        let uri = format!("http://{address}").parse().expect("a URI");
        Self { client: Client::try_from(Config::new(uri)).expect("a client"), requests }
    }

    /// Returns the requests since the last call, such as `PATCH /api/v1/namespaces/kube-system/services/a`. Watches
    /// are not recorded.
    pub(crate) fn take_requests(&self) -> Vec<String> {
        std::mem::take(&mut *self.requests.lock().expect("no test holds it"))
    }
}

async fn handle(
    request: Request<Incoming>,
    requests: Arc<Mutex<Vec<String>>>,
    respond: Arc<Respond>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    if request.uri().query().is_some_and(|query| query.contains("watch=true")) {
        return pending().await;
    }
    let what = format!("{} {}", request.method(), request.uri().path());
    let _ = request.into_body().collect().await;
    let (status, body) = match respond(&what) {
        Ok(json) => (200, json),
        Err(code) => {
            let reason = if code == 404 { "NotFound" } else { "Forbidden" };
            (
                code,
                format!(
                    r#"{{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"{reason}","message":"no","code":{code}}}"#
                ),
            )
        }
    };
    requests.lock().expect("no test holds it").push(what);
    Ok(Response::builder().status(status).body(Full::new(body.into())).expect("a status code written in a test"))
}

/// Returns a list of the objects as JSON.
pub(crate) fn list(items: &[&str]) -> String {
    format!(r#"{{"apiVersion":"v1","kind":"List","metadata":{{"resourceVersion":"1"}},"items":[{}]}}"#, items.join(","))
}
