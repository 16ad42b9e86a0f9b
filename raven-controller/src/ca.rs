//! Certificate authorities of the controller, and the Secrets that store them. Used for the conversion webhook and
//! for the proxies.
//!
//! [`CaSecret`] loads, creates and rotates the content of a Secret; a [`CaMaterial`] defines the content and when it is
//! due for rotation.

use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use futures::{Stream, StreamExt};
use jiff::{SignedDuration, Timestamp, tz::TimeZone};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::PostParams;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource};
use raven_api::MANAGER_CONTROLLER;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Length of a day.
pub(crate) const DAY: SignedDuration = SignedDuration::from_hours(24);
/// Validity of a CA certificate.
pub(crate) const CA_LIFE: SignedDuration = SignedDuration::from_hours(10 * 365 * 24);

/// The content of a CA Secret could not be loaded, created or rotated.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The API server rejected the request, or is unreachable.
    #[error("cannot {verb} Secret {name}: {source} (check that RBAC allows it, see deploy/rbac.yaml)")]
    Api {
        /// The attempted operation.
        verb: &'static str,
        /// Name of the Secret.
        name: String,
        /// Error of the client.
        source: Box<kube::Error>,
    },
    /// The Secret does not exist; the controller may not create Secrets.
    #[error("Secret {namespace}/{name} does not exist; apply the manifests in deploy/")]
    Missing {
        /// Namespace of the Secret.
        namespace: String,
        /// Name of the Secret.
        name: String,
    },
    /// A key or certificate cannot be created.
    #[error("cannot create certificates for Secret {name}: {source}")]
    Certificate {
        /// Name of the Secret.
        name: String,
        /// Error of the certificate library.
        source: rcgen::Error,
    },
    /// The content cannot be encoded.
    #[error("cannot encode the content of Secret {name} as JSON: {source}")]
    Encode {
        /// Name of the Secret.
        name: String,
        /// Error of the encoder.
        source: serde_json::Error,
    },
}

/// Content of a CA Secret.
pub(crate) trait CaMaterial: Serialize + DeserializeOwned {
    /// Key in the Secret's data that holds the complete material as JSON.
    const KEY: &'static str;

    /// Returns additional entries of the Secret's data, for users and tools.
    fn public_entries(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }
}

/// Result of [`CaSecret::rotate`].
#[derive(Debug)]
pub(crate) enum Rotation<M> {
    /// The stored material is valid.
    Unchanged(M),
    /// New material was stored; the second value is the written Secret.
    Rotated(M, Box<Secret>),
    /// A different replica changed the Secret since it was read. Its content must be read again.
    Conflict,
}

/// A Secret that stores a CA. The manifests contain it empty, because RBAC cannot restrict the creation of Secrets
/// to a name.
#[derive(Clone)]
pub(crate) struct CaSecret {
    secrets: Api<Secret>,
    namespace: String,
    name: String,
}

impl CaSecret {
    /// Creates an accessor for the Secret.
    pub(crate) fn new(client: Client, namespace: &str, name: &str) -> Self {
        Self { secrets: Api::namespaced(client, namespace), namespace: namespace.to_owned(), name: name.to_owned() }
    }

    /// Returns the present Secret.
    pub(crate) async fn load(&self) -> Result<Secret, Error> {
        let secret = self.secrets.get_opt(&self.name).await.map_err(|e| self.api_error("read", e))?;
        secret.ok_or_else(|| Error::Missing { namespace: self.namespace.clone(), name: self.name.clone() })
    }

    /// Watches the Secret. Yields `None` if it does not exist.
    pub(crate) fn watch(&self) -> impl Stream<Item = Option<Secret>> + use<> {
        watch_one("Secret", self.secrets.clone(), &self.name)
    }

    /// Reads the material of `secret`, and stores new material if `next` returns some. Unreadable material
    /// counts as absent.
    pub(crate) async fn rotate<M: CaMaterial>(
        &self,
        mut secret: Secret,
        next: impl FnOnce(Option<&M>) -> Result<Option<M>, rcgen::Error>,
    ) -> Result<Rotation<M>, Error> {
        let present = read::<M>(&secret);
        let next = next(present.as_ref()).map_err(|source| Error::Certificate { name: self.name.clone(), source })?;
        let material = match (next, present) {
            (Some(next), _) => next,
            (None, Some(present)) => return Ok(Rotation::Unchanged(present)),
            (None, None) => return Ok(Rotation::Conflict),
        };
        let json =
            serde_json::to_string(&material).map_err(|source| Error::Encode { name: self.name.clone(), source })?;
        let entries = material.public_entries().into_iter().chain([(M::KEY, json)]);
        secret.data = Some(entries.map(|(key, text)| (key.to_owned(), ByteString(text.into_bytes()))).collect());
        let params = PostParams { field_manager: Some(MANAGER_CONTROLLER.to_owned()), ..PostParams::default() };
        match self.secrets.replace(&self.name, &params, &secret).await {
            Ok(written) => Ok(Rotation::Rotated(material, Box::new(written))),
            Err(kube::Error::Api(status)) if status.is_conflict() => Ok(Rotation::Conflict),
            Err(e) => Err(self.api_error("write", e)),
        }
    }

    fn api_error(&self, verb: &'static str, source: kube::Error) -> Error {
        Error::Api { verb, name: self.name.clone(), source: Box::new(source) }
    }
}

/// Reads the material of a Secret; `None` if it is absent or unreadable.
pub(crate) fn read<M: CaMaterial>(secret: &Secret) -> Option<M> {
    let bytes = &secret.data.as_ref()?.get(M::KEY)?.0;
    let name = secret.metadata.name.as_deref().unwrap_or_default();
    serde_json::from_slice(bytes)
        .inspect_err(|e| tracing::warn!(secret = name, key = M::KEY, error = %e, "cannot parse the Secret; creating new certificates"))
        .ok()
}

/// Watches a single object by name. Yields its present state after each change, `None` if it does not exist.
pub(crate) fn watch_one<K>(kind: &'static str, api: Api<K>, name: &str) -> impl Stream<Item = Option<K>> + use<K>
where
    K: Resource + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let events = watcher(api, watcher::Config::default().fields(&format!("metadata.name={name}"))).default_backoff();
    let listed: Arc<Mutex<Option<K>>> = Arc::default();
    events.filter_map(move |event| {
        let state = match event {
            Ok(Event::Apply(object)) => Some(Some(object)),
            Ok(Event::Delete(_)) => Some(None),
            Ok(Event::Init) => None,
            Ok(Event::InitApply(object)) => {
                if let Ok(mut listed) = listed.lock() {
                    *listed = Some(object);
                }
                None
            }
            Ok(Event::InitDone) => Some(listed.lock().ok().and_then(|mut listed| listed.take())),
            Err(e) => {
                tracing::warn!(kind, error = %e, "watch failed; retrying (check that RBAC allows list and watch)");
                None
            }
        };
        std::future::ready(state)
    })
}

/// A new CA certificate with its key.
#[derive(Debug)]
pub(crate) struct NewAuthority {
    /// Certificate in PEM.
    pub(crate) certificate: String,
    /// Private key in PEM.
    pub(crate) key: String,
    /// End of the validity.
    pub(crate) not_after: Timestamp,
}

/// Creates a CA. Two CAs of the same name are distinguished by their key identifiers.
pub(crate) fn create(name: &str, now: Timestamp) -> Result<NewAuthority, rcgen::Error> {
    let mut params = params(name);
    let not_after = end(now, CA_LIFE);
    set_validity(&mut params, now, not_after);
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let certificate = params.self_signed(&key)?.pem();
    Ok(NewAuthority { certificate, key: key.serialize_pem(), not_after })
}

/// Returns the parameters of a CA certificate without its validity. Signing with the CA needs them, too.
pub(crate) fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    params
}

/// True once two thirds of the validity are over.
pub(crate) fn is_due(not_after: Timestamp, life: SignedDuration, now: Timestamp) -> bool {
    not_after.duration_since(now) < life / 3
}

/// Returns the end of a validity that starts now, rounded down to a whole day: without the `time` crate, rcgen
/// accepts dates only.
pub(crate) fn end(now: Timestamp, life: SignedDuration) -> Timestamp {
    let seconds = (now + life).as_second();
    Timestamp::from_second(seconds - seconds.rem_euclid(DAY.as_secs())).unwrap_or(now)
}

/// Sets the validity of a certificate. It starts a day before `now`, because the clocks of other hosts may be behind.
pub(crate) fn set_validity(params: &mut CertificateParams, now: Timestamp, not_after: Timestamp) {
    let midnight = |at: Timestamp| {
        let date = at.to_zoned(TimeZone::UTC).date();
        let part = |n: i8| u8::try_from(n).unwrap_or(1);
        rcgen::date_time_ymd(date.year().into(), part(date.month()), part(date.day()))
    };
    params.not_before = midnight(now - DAY);
    params.not_after = midnight(not_after);
}
