//! The metrics address with `--metrics-secure`: TLS, and a bearer token whose owner may `get` the path, as kubelets and
//! kube-rbac-proxy require it (TokenReview, then SubjectAccessReview with a nonResourceURL).
//!
//! Requests from the node itself may be plain and need no token, so that `curl localhost:10265/status` works at a site
//! without an API server.

use std::{
    collections::HashMap,
    fs, io,
    num::NonZeroU32,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use hyper::{Request, StatusCode, header::AUTHORIZATION};
use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec, UserInfo},
    authorization::v1::{NonResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec},
};
use kube::{Api, Client, api::PostParams};
use sha2::{Digest, Sha256};
use tokio::time::timeout;
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, ServerConfig,
        crypto::ring,
        pki_types::{
            CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer,
            pem::{self, PemObject},
        },
    },
};

/// Time for which a positive answer of the API server holds. A scrape every 30 s then costs a request in five minutes.
const ALLOWED: Duration = Duration::from_secs(300);
/// Time for which it counts after that if the API server does not answer: an outage must not end monitoring.
const ALLOWED_IN_AN_OUTAGE: Duration = Duration::from_secs(3600);
/// Time for which a negative answer holds.
const DENIED: Duration = Duration::from_secs(30);
/// Answers that are kept.
const ANSWERS: usize = 256;
/// Timeout of a question to the API server.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Questions to the API server per second about new tokens: a client can ask with any number of invalid ones.
const QUESTIONS: NonZeroU32 = NonZeroU32::new(5).expect("it is not zero");

/// The address cannot be served with TLS.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the certificate cannot be read.
    #[error(
        "cannot read {path}: {reason} (--metrics-cert-dir needs tls.crt and tls.key, as a Secret of type kubernetes.io/tls has)"
    )]
    File {
        /// The file.
        path: PathBuf,
        /// The error of the file system.
        reason: io::Error,
    },
    /// A file is not PEM, or lacks the key or the certificate.
    #[error("cannot use the certificate in {folder}: {reason}")]
    Pem {
        /// The folder.
        folder: PathBuf,
        /// What is wrong.
        reason: pem::Error,
    },
    /// No certificate can be created.
    #[error("cannot create a certificate: {0}")]
    Create(#[from] rcgen::Error),
    /// TLS refuses key or certificate.
    #[error("cannot configure TLS: {0}")]
    Tls(#[from] rustls::Error),
}

/// Why a request is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    /// It has no token, or one that the API server does not know.
    #[error("send the token of a service account: Authorization: Bearer TOKEN (kubectl create token ACCOUNT)")]
    Unauthenticated,
    /// The token's owner may not read the path.
    #[error("{user} may not get {path}: it needs a ClusterRole with nonResourceURLs [{path}] and verbs [get]")]
    Forbidden {
        /// Name of the owner.
        user: String,
        /// The requested path.
        path: String,
    },
    /// Too many tokens were presented.
    #[error("too many new tokens; repeat the request later")]
    TooMany,
    /// The API server did not answer.
    #[error("cannot ask the API server about the token: {0}")]
    Unknown(String),
}

impl Refusal {
    /// Status code of the answer.
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::Unauthenticated => StatusCode::UNAUTHORIZED,
            Self::Forbidden { .. } => StatusCode::FORBIDDEN,
            Self::TooMany => StatusCode::TOO_MANY_REQUESTS,
            Self::Unknown(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// Decides who may read what describes the node and its traffic.
pub struct Access {
    /// `None` without an API server.
    client: Option<Client>,
    certificate: Certificate,
    answers: Mutex<Answers>,
    limit: DefaultDirectRateLimiter,
    warnings: DefaultDirectRateLimiter,
}

/// The server's certificate.
enum Certificate {
    /// In this folder. It is read for each connection, because another program renews it.
    Folder(PathBuf),
    /// Created at the start.
    SelfSigned(TlsAcceptor),
}

impl Access {
    /// With the certificate in `folder` (`tls.crt`, `tls.key`), or a self-signed one for the node's name.
    pub fn new(client: Option<Client>, node: &str, folder: Option<PathBuf>) -> Result<Self, Error> {
        let certificate = match folder {
            Some(folder) => {
                // Forwarding must not depend on it. Each connection reads the files again.
                if let Err(e) = from_folder(&folder) {
                    tracing::error!(error = %e, "metrics are not served until this is repaired");
                }
                Certificate::Folder(folder)
            }
            None => Certificate::SelfSigned(self_signed(node)?),
        };
        Ok(Self {
            client,
            certificate,
            answers: Mutex::default(),
            limit: RateLimiter::direct(Quota::per_second(QUESTIONS)),
            warnings: RateLimiter::direct(Quota::per_minute(NonZeroU32::MIN)),
        })
    }

    /// True at most once a minute: connections cannot fill the log.
    pub(super) fn may_warn(&self) -> bool {
        self.warnings.check().is_ok()
    }

    /// Acceptor for one connection.
    pub(super) fn acceptor(&self) -> Result<TlsAcceptor, Error> {
        match &self.certificate {
            Certificate::Folder(folder) => from_folder(folder),
            Certificate::SelfSigned(acceptor) => Ok(acceptor.clone()),
        }
    }

    /// Checks the token of a request.
    pub(super) async fn check<B>(&self, request: &Request<B>) -> Result<(), Refusal> {
        let header = request.headers().get(AUTHORIZATION).and_then(|header| header.to_str().ok());
        let token =
            header.and_then(|text| text.strip_prefix("Bearer ")).map(str::trim).filter(|token| !token.is_empty());
        let token = token.ok_or(Refusal::Unauthenticated)?;
        let path = request.uri().path();
        let question = Question::new(token, path);
        let known = self.answers().get(&question, Instant::now());
        if let Some(Known { answer, fresh: true }) = known {
            return answer.into_result(path);
        }
        // A token that was good is asked about again whatever others send.
        if known.is_none() {
            self.limit.check().map_err(|_| Refusal::TooMany)?;
        }
        let client =
            self.client.as_ref().ok_or_else(|| Refusal::Unknown("the agent runs with --offline".to_owned()))?;
        let answer = match timeout(TIMEOUT, ask(client, token, path)).await {
            Ok(Ok(answer)) => answer,
            failed => {
                let reason = match failed {
                    Ok(Err(e)) => e.to_string(),
                    _ => format!("no answer within {} s", TIMEOUT.as_secs()),
                };
                return known.map_or(Err(Refusal::Unknown(reason)), |known| known.answer.into_result(path));
            }
        };
        self.answers().put(question, answer.clone(), Instant::now());
        answer.into_result(path)
    }

    fn answers(&self) -> std::sync::MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the API server answered about a token and a path.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Answer {
    Allowed,
    Unauthenticated,
    Forbidden { user: String },
}

impl Answer {
    fn into_result(self, path: &str) -> Result<(), Refusal> {
        match self {
            Self::Allowed => Ok(()),
            Self::Unauthenticated => Err(Refusal::Unauthenticated),
            Self::Forbidden { user } => Err(Refusal::Forbidden { user, path: path.to_owned() }),
        }
    }

    fn life(&self) -> Duration {
        if *self == Self::Allowed { ALLOWED } else { DENIED }
    }

    /// How long it counts after its life, if the API server does not answer.
    fn in_an_outage(&self) -> Option<Duration> {
        (*self == Self::Allowed).then_some(ALLOWED_IN_AN_OUTAGE)
    }
}

/// A token and a path, as a hash: tokens are not kept in memory.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Question([u8; 32]);

impl Question {
    fn new(token: &str, path: &str) -> Self {
        // A token has no blank.
        Self(Sha256::digest(format!("{token} {path}")).into())
    }
}

/// An answer that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Known {
    answer: Answer,
    /// It still holds; else it counts only if the API server does not answer.
    fresh: bool,
}

/// The answers, with the time until which they hold.
#[derive(Default)]
struct Answers(HashMap<Question, (Answer, Instant)>);

impl Answers {
    fn get(&self, question: &Question, now: Instant) -> Option<Known> {
        let (answer, ends) = self.0.get(question)?;
        let counts = answer.in_an_outage().is_some_and(|longer| *ends + longer > now);
        let fresh = *ends > now;
        (fresh || counts).then(|| Known { answer: answer.clone(), fresh })
    }

    fn put(&mut self, question: Question, answer: Answer, now: Instant) {
        if self.0.len() >= ANSWERS {
            self.0.retain(|_, (answer, ends)| *ends + answer.in_an_outage().unwrap_or_default() > now);
        }
        // Invalid tokens must not evict the valid ones.
        if self.0.len() >= ANSWERS {
            self.0.retain(|_, (answer, _)| *answer == Answer::Allowed);
        }
        if self.0.len() < ANSWERS {
            let ends = now + answer.life();
            self.0.insert(question, (answer, ends));
        }
    }
}

async fn ask(client: &Client, token: &str, path: &str) -> kube::Result<Answer> {
    let spec = TokenReviewSpec { token: Some(token.to_owned()), audiences: None };
    let review = TokenReview { spec, ..TokenReview::default() };
    let review = Api::all(client.clone()).create(&PostParams::default(), &review).await?;
    let status = review.status.unwrap_or_default();
    let Some(user) = status.user.filter(|_| status.authenticated == Some(true)) else {
        return Ok(Answer::Unauthenticated);
    };
    let name = user.username.clone().unwrap_or_default();
    let review = SubjectAccessReview { spec: access(user, path), ..SubjectAccessReview::default() };
    let review = Api::all(client.clone()).create(&PostParams::default(), &review).await?;
    Ok(match review.status.is_some_and(|status| status.allowed) {
        true => Answer::Allowed,
        false => Answer::Forbidden { user: name },
    })
}

/// May this user `get` the path?
fn access(user: UserInfo, path: &str) -> SubjectAccessReviewSpec {
    SubjectAccessReviewSpec {
        non_resource_attributes: Some(NonResourceAttributes {
            path: Some(path.to_owned()),
            verb: Some("get".to_owned()),
        }),
        user: user.username,
        uid: user.uid,
        groups: user.groups,
        extra: user.extra,
        ..SubjectAccessReviewSpec::default()
    }
}

fn from_folder(folder: &Path) -> Result<TlsAcceptor, Error> {
    let read = |name: &str| {
        let path = folder.join(name);
        fs::read(&path).map_err(|reason| Error::File { path, reason })
    };
    let bad = |reason| Error::Pem { folder: folder.to_owned(), reason };
    let chain = CertificateDer::pem_slice_iter(&read("tls.crt")?).collect::<Result<Vec<_>, _>>().map_err(bad)?;
    let key = PrivateKeyDer::from_pem_slice(&read("tls.key")?).map_err(bad)?;
    acceptor(chain, key)
}

fn self_signed(node: &str) -> Result<TlsAcceptor, Error> {
    let created = rcgen::generate_simple_self_signed([node.to_owned()])?;
    let key = PrivatePkcs8KeyDer::from(created.signing_key.serialize_der());
    acceptor(vec![created.cert.der().clone()], key.into())
}

fn acceptor(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<TlsAcceptor, Error> {
    let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let config = builder.with_safe_default_protocol_versions()?.with_no_client_auth().with_single_cert(chain, key)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_end_and_invalid_tokens_do_not_evict_valid_ones() {
        let (mut answers, now) = (Answers::default(), Instant::now());
        let good = Question::new("good", "/metrics");
        answers.put(good.clone(), Answer::Allowed, now);
        for number in 0..2 * ANSWERS {
            answers.put(Question::new(&format!("bad{number}"), "/metrics"), Answer::Unauthenticated, now);
        }
        assert!(answers.0.len() <= ANSWERS);
        let known = |fresh| Some(Known { answer: Answer::Allowed, fresh });
        assert_eq!(answers.get(&good, now), known(true));
        assert_eq!(answers.get(&Question::new("good", "/drops"), now), None, "another path is another question");
        assert_eq!(answers.get(&good, now + ALLOWED), known(false), "for an outage of the API server");
        assert_eq!(answers.get(&good, now + ALLOWED + ALLOWED_IN_AN_OUTAGE), None);
        let bad = Question::new("bad", "/metrics");
        answers.put(bad.clone(), Answer::Unauthenticated, now);
        assert_eq!(answers.get(&bad, now + DENIED), None, "a new ClusterRoleBinding counts soon");
    }

    #[tokio::test]
    async fn request_without_an_answer_of_the_api_server_is_refused() {
        let access = Access::new(None, "x-a", None).expect("a certificate");
        let refusal = async |header: Option<&str>| {
            let request = header.iter().fold(Request::get("/metrics"), |r, text| r.header(AUTHORIZATION, *text));
            access.check(&request.body(()).expect("a request")).await.expect_err("refused").status()
        };
        assert_eq!(refusal(None).await, StatusCode::UNAUTHORIZED);
        for header in ["Bearer ", "Basic dXNlcjpwYXNz", "Bearer"] {
            assert_eq!(refusal(Some(header)).await, StatusCode::UNAUTHORIZED, "{header}");
        }
        assert_eq!(refusal(Some("Bearer token")).await, StatusCode::SERVICE_UNAVAILABLE);
        let mut statuses = Vec::new();
        for _ in 0..QUESTIONS.get() {
            statuses.push(refusal(Some("Bearer token")).await);
        }
        assert!(statuses.contains(&StatusCode::TOO_MANY_REQUESTS), "{statuses:?}");
    }

    #[test]
    fn certificate_in_a_folder_is_read_for_each_connection() {
        let folder = tempfile::tempdir().expect("a folder");
        let access = Access::new(None, "x-a", Some(folder.path().to_owned())).expect("the agent starts without it");
        let error = || access.acceptor().err().map(|e| e.to_string());
        assert!(error().is_some_and(|e| e.contains("tls.crt") && e.contains("kubernetes.io/tls")));
        let created = rcgen::generate_simple_self_signed(["raven".to_owned()]).expect("a certificate");
        fs::write(folder.path().join("tls.crt"), created.cert.pem()).expect("write");
        fs::write(folder.path().join("tls.key"), "no key").expect("write");
        assert!(error().is_some_and(|e| e.starts_with("cannot use the certificate in")));
        fs::write(folder.path().join("tls.key"), created.signing_key.serialize_pem()).expect("write");
        assert_eq!(error(), None);
    }
}
