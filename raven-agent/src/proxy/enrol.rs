//! Gets a certificate from the controller, by the CertificateSigningRequest API, and a new one before it ends. Open tunnels are not
//! touched by that: the next ones use it.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};

use backon::{BackoffBuilder, ExponentialBuilder, Retryable};
use jiff::Timestamp;
use k8s_openapi::{
    ByteString,
    api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec},
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use raven_api::proxy::{SIGNER_CLIENT, SIGNER_SERVER};
use tokio::{sync::watch, time::sleep};

use super::identity::{self, Identity};
use crate::names;

/// How long a certificate is asked for, seconds: an edge that sees no API server for a month goes on all the same.
const LIFE: i32 = 90 * 24 * 3600;
/// How often is looked whether one is due.
const LOOK: Duration = Duration::from_secs(60);
/// After a failure: from, to. A request that is refused is refused again until somebody has changed something.
const AGAIN: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(300));

/// What this node needs a certificate for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Purpose {
    /// Nothing.
    #[default]
    None,
    /// To dial, as this node, of this UID where it is known.
    Client(Option<String>),
    /// To be dialled, by these names and addresses.
    Server(BTreeSet<String>),
}

/// What the keeper goes by: the purpose, and the CA's certificates (PEM).
pub type Wanted = (Purpose, String);

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Identity(#[from] identity::Error),
    #[error("ask for a certificate: {0} (does RBAC allow it? see deploy/rbac.yaml)")]
    Api(#[from] kube::Error),
    #[error("CertificateSigningRequest {name} was refused: {why}")]
    Denied { name: String, why: String },
    #[error("CertificateSigningRequest {0} is not signed yet (does raven-controller run?)")]
    Pending(String),
    #[error("the controller has published no CA yet (ConfigMap raven-proxy-ca: does raven-controller run?)")]
    NoCa,
    #[error("the certificate that came back is not signed by the CA of ConfigMap raven-proxy-ca")]
    Foreign,
}

/// Keeps an identity; `identity` holds none while there is no purpose, or nothing usable.
pub(crate) struct Keeper {
    pub(crate) node: String,
    /// `None`: offline, with what is on the disk.
    pub(crate) client: Option<Client>,
    /// Folder of all state.
    pub(crate) state: PathBuf,
    pub(crate) wanted: watch::Receiver<Wanted>,
    pub(crate) identity: watch::Sender<Option<Arc<Identity>>>,
    /// Why there is none, for the status.
    pub(crate) problem: watch::Sender<Option<String>>,
}

impl Keeper {
    pub(crate) async fn run(mut self) {
        let delays =
            || ExponentialBuilder::default().with_min_delay(AGAIN.0).with_max_delay(AGAIN.1).with_jitter().without_max_times().build();
        let mut again = delays();
        let mut pending = None;
        loop {
            let (purpose, ca) = self.wanted.borrow_and_update().clone();
            let wait = match self.keep(&purpose, &ca, &mut pending).await {
                Ok(()) => {
                    self.problem.send_replace(None);
                    again = delays();
                    LOOK
                }
                Err(e) => {
                    let text = e.to_string();
                    if self.problem.borrow().as_ref() != Some(&text) {
                        tracing::warn!("certificate of the proxy: {text}");
                    }
                    self.problem.send_replace(Some(text));
                    again.next().unwrap_or(AGAIN.1)
                }
            };
            tokio::select! {
                changed = self.wanted.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    again = delays();
                }
                () = sleep(wait) => {}
            }
        }
    }

    async fn keep(&self, purpose: &Purpose, ca: &str, pending: &mut Option<Asked>) -> Result<(), Error> {
        let (signer, names, uid, folder) = match purpose {
            Purpose::None => {
                self.identity.send_replace(None);
                return Ok(());
            }
            Purpose::Client(uid) => (SIGNER_CLIENT, BTreeSet::from([self.node.clone()]), uid.as_ref(), names::PROXY_CLIENT_DIR),
            Purpose::Server(names) => (SIGNER_SERVER, names.clone(), None, names::PROXY_SERVER_DIR),
        };
        if ca.is_empty() {
            return Err(Error::NoCa);
        }
        let path = self.state.join(folder).join("pki/identity.pem");
        let now = Timestamp::now();
        let stored = match identity::load(&path)? {
            // One that cannot be read is made anew.
            Some(pem) => Identity::parse(&pem, ca).ok().flatten(),
            None => None,
        };
        let due = stored.as_ref().is_none_or(|identity| identity.is_due(&names, uid, now));
        if let Some(stored) = stored.filter(|identity| !identity.is_over(now)) {
            self.offer(stored);
        }
        let Some(client) = self.client.as_ref().filter(|_| due) else { return Ok(()) };
        // What was asked for already is waited for, and not asked for again: nobody may be there to answer for days.
        let asked = match pending.take().filter(|asked| asked.signer == signer && asked.names == names) {
            Some(asked) => asked,
            None => {
                let (key, request) = identity::request(&self.node, &names)?;
                Asked { signer, names, key, request: ask(client, &self.node, signer, request).await? }
            }
        };
        let certificate = match signed(client, &asked.request).await {
            Ok(certificate) => certificate,
            Err(e @ (Error::Pending(_) | Error::Api(_))) => {
                // One that was deleted (the API server does so after a day) is asked for anew.
                let gone = matches!(&e, Error::Api(kube::Error::Api(status)) if status.code == 404);
                *pending = Some(asked).filter(|_| !gone);
                return Err(e);
            }
            Err(e) => return Err(e),
        };
        let pem = asked.key + &certificate;
        let identity = Identity::parse(pem.as_bytes(), ca)?.ok_or(Error::Foreign)?;
        identity::save(&path, &pem)?;
        tracing::info!(names = ?identity.names, not_after = %identity.life.1, "a certificate for the proxy");
        self.offer(identity);
        Ok(())
    }

    fn offer(&self, identity: Identity) {
        self.identity.send_if_modified(|have| {
            let changed = have.as_deref() != Some(&identity);
            if changed {
                *have = Some(Arc::new(identity));
            }
            changed
        });
    }
}

/// A request that was made.
struct Asked {
    signer: &'static str,
    names: BTreeSet<String>,
    /// The key that it is for, PEM.
    key: String,
    /// Name of the CertificateSigningRequest.
    request: String,
}

/// Asks; gives the request's name.
async fn ask(client: &Client, node: &str, signer: &str, request: String) -> Result<String, Error> {
    let api: Api<CertificateSigningRequest> = Api::all(client.clone());
    let usage = if signer == SIGNER_CLIENT { "client auth" } else { "server auth" };
    let object = CertificateSigningRequest {
        metadata: ObjectMeta { generate_name: Some(format!("raven-proxy-{node}-")), ..ObjectMeta::default() },
        spec: CertificateSigningRequestSpec {
            request: ByteString(request.into_bytes()),
            signer_name: signer.to_owned(),
            usages: Some(vec!["digital signature".to_owned(), usage.to_owned()]),
            expiration_seconds: Some(LIFE),
            ..CertificateSigningRequestSpec::default()
        },
        ..CertificateSigningRequest::default()
    };
    Ok(api.create(&PostParams::default(), &object).await?.metadata.name.unwrap_or_default())
}

/// Waits a while for the answer: PEM.
async fn signed(client: &Client, name: &str) -> Result<String, Error> {
    let api: Api<CertificateSigningRequest> = Api::all(client.clone());
    let signed = || async {
        let status = api.get(name).await?.status.unwrap_or_default();
        if let Some(certificate) = status.certificate {
            return Ok(String::from_utf8_lossy(&certificate.0).into_owned());
        }
        let conditions = status.conditions.unwrap_or_default();
        let refused = conditions.iter().find(|c| c.type_ == "Denied" || c.type_ == "Failed");
        match refused {
            Some(condition) => {
                Err(Error::Denied { name: name.to_owned(), why: condition.message.clone().unwrap_or_else(|| condition.type_.clone()) })
            }
            None => Err(Error::Pending(name.to_owned())),
        }
    };
    let patience =
        ExponentialBuilder::default().with_min_delay(Duration::from_millis(200)).with_max_delay(Duration::from_secs(2)).with_max_times(15);
    signed.retry(patience).when(|e| matches!(e, Error::Pending(_))).await
}
