//! HTTPS server of the conversion webhook: `POST /convert`.
//!
//! Clients are not authenticated. The response depends on the request only, so it discloses nothing, and the cost of a
//! request is bounded.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use raven_api::schema::WEBHOOK_PATH;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{ClientHello, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{self, ServerConfig};
use tokio_util::sync::CancellationToken;

use super::certificate::Material;
use super::convert;
use crate::accept::accept;

// The API server sends a list of all Gateways in one request: a thousand with ten nodes each take 5 MB.
const MAX_BODY: usize = 32 << 20;
// Concurrent connections.
const MAX_CONNECTIONS: usize = 64;
// Concurrent conversions: each holds a body and its objects in memory.
const MAX_CONVERSIONS: usize = 4;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
// The API server cancels a request after 30 s.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
// Also the idle timeout of a connection: the API server closes idle connections after 90 s.
const HEADER_TIMEOUT: Duration = Duration::from_secs(120);

/// The webhook cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The port cannot be opened.
    #[error(
        "cannot listen on {address} for the conversion webhook: {source} (another process may use the port; see --webhook-bind-addr)"
    )]
    Listen {
        /// Address to listen on.
        address: SocketAddr,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// TLS cannot be set up.
    #[error("cannot set up TLS for the conversion webhook: {0}")]
    Tls(#[from] rustls::Error),
    /// The certificate or key of the Secret is malformed.
    #[error("cannot parse the webhook's certificate: {0}")]
    Pem(#[from] pem::Error),
}

/// Served certificate and key; `None` until the first one is available. [`rotation`](super::rotation) replaces
/// it without interruption.
pub(crate) type ServingIdentity = Option<Arc<CertifiedKey>>;

/// Parses certificate and key for the TLS library.
pub(crate) fn identity(material: &Material) -> Result<ServingIdentity, Error> {
    let chain = CertificateDer::pem_slice_iter(material.certificate.as_bytes()).collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(material.key.as_bytes())?;
    Ok(Some(Arc::new(CertifiedKey::from_der(chain, key, &ring::default_provider())?)))
}

// Serves the present certificate.
#[derive(Debug)]
struct PresentIdentity(watch::Receiver<ServingIdentity>);

impl ResolvesServerCert for PresentIdentity {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.borrow().clone()
    }
}

/// The webhook's server.
pub(crate) struct Server {
    listener: TcpListener,
    tls: TlsAcceptor,
}

impl Server {
    /// Opens the port. Handshakes fail until a certificate is available.
    pub(crate) async fn bind(address: SocketAddr, identity: watch::Receiver<ServingIdentity>) -> Result<Self, Error> {
        let provider = Arc::new(ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        let config = config.with_no_client_auth().with_cert_resolver(Arc::new(PresentIdentity(identity)));
        let listener = TcpListener::bind(address).await.map_err(|source| Error::Listen { address, source })?;
        Ok(Self { listener, tls: TlsAcceptor::from(Arc::new(config)) })
    }

    /// Answers requests until `stop` is cancelled.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let conversions = Arc::new(Semaphore::new(MAX_CONVERSIONS));
        loop {
            let Ok(permit) = connections.clone().acquire_owned().await else { return };
            let stream = tokio::select! {
                stream = accept(&self.listener, "a connection to the conversion webhook") => stream,
                () = stop.cancelled() => return,
            };
            let (tls, conversions, stop) = (self.tls.clone(), conversions.clone(), stop.clone());
            tokio::spawn(async move {
                let _permit = permit;
                tokio::select! {
                    () = connection(stream, tls, conversions) => {}
                    () = stop.cancelled() => {}
                }
            });
        }
    }
}

async fn connection(stream: TcpStream, tls: TlsAcceptor, conversions: Arc<Semaphore>) {
    let stream = match timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        // An API server without our CA logs this itself; port scanners cause it as well.
        Ok(Err(e)) => return tracing::debug!(error = %e, "TLS handshake with the conversion webhook failed"),
        Err(_) => return,
    };
    let service = service_fn(move |request| {
        let conversions = conversions.clone();
        async move { Ok::<_, Infallible>(respond(request, &conversions).await) }
    });
    let http = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(e) = http.await {
        tracing::debug!(error = %e, "connection to the conversion webhook failed");
    }
}

async fn respond(request: Request<Incoming>, conversions: &Semaphore) -> Response<Full<Bytes>> {
    if request.uri().path() != WEBHOOK_PATH {
        return plain(StatusCode::NOT_FOUND, format!("see {WEBHOOK_PATH}\n"));
    }
    if request.method() != Method::POST {
        return plain(StatusCode::METHOD_NOT_ALLOWED, "post a ConversionReview\n".to_owned());
    }
    let Ok(_permit) = conversions.acquire().await else {
        return plain(StatusCode::SERVICE_UNAVAILABLE, "stopping\n".to_owned());
    };
    let body = match timeout(BODY_TIMEOUT, Limited::new(request.into_body(), MAX_BODY).collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(e)) => return plain(StatusCode::PAYLOAD_TOO_LARGE, format!("cannot read the ConversionReview: {e}\n")),
        Err(_) => return plain(StatusCode::REQUEST_TIMEOUT, "timeout while reading the ConversionReview\n".to_owned()),
    };
    // Conversion of a large list takes milliseconds and must not delay the elector.
    let span = tracing::info_span!("conversion_request", bytes = body.len());
    let convert = move || span.in_scope(|| convert::answer(&body).map(|review| serde_json::to_vec(&review)));
    match tokio::task::spawn_blocking(convert).await {
        Ok(Ok(Ok(bytes))) => {
            let mut response = Response::new(Full::new(Bytes::from(bytes)));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            response
        }
        Ok(Err(e)) => plain(StatusCode::BAD_REQUEST, format!("{e}\n")),
        Ok(Ok(Err(e))) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{e}\n")),
        Err(e) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{e}\n")),
    }
}

fn plain(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response
}
