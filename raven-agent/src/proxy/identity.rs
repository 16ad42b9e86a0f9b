//! This node's identity towards the other end of a proxy connection: a key that is created here and never leaves
//! the node, a certificate that the controller signed, and the CA that this node trusts. [`super::enrol`]
//! obtains the certificate.

use std::{collections::BTreeSet, fs, io, path::Path, sync::Arc};

use jiff::Timestamp;
use raven_api::proxy::UID_URI;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PKCS_ECDSA_P256_SHA256};
use tokio_rustls::rustls::{
    self, ClientConfig, RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{
        CertificateDer, PrivateKeyDer,
        pem::{self, PemObject},
    },
    server::WebPkiClientVerifier,
    version::TLS13,
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::{atomic_file, plan::proxy::EdgeIdentity};

/// ALPN protocol name of a proxy connection (RFC 7301).
const ALPN: &[u8] = b"raven/1";
/// Organisation in the subject of every certificate.
const ORGANIZATION: &str = "raven:proxy";

/// An identity cannot be stored, read or used.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// The file cannot be read or written.
    #[error("cannot use the identity in {path}: {reason}")]
    File {
        /// Path of the file.
        path: String,
        /// The error of the file system.
        reason: io::Error,
    },
    /// The text is not PEM with a key and certificates.
    #[error("cannot parse a key and certificates: {0}")]
    Pem(pem::Error),
    /// A certificate does not parse, or lacks what is needed.
    #[error("cannot use a certificate: {0}")]
    Certificate(String),
    /// A key or a request cannot be created.
    #[error("cannot create a key and a certificate request: {0}")]
    Request(rcgen::Error),
    /// TLS refuses the key, the certificate or the CA.
    #[error("cannot configure TLS: {0}")]
    Tls(String),
}

impl From<pem::Error> for Error {
    fn from(error: pem::Error) -> Self {
        Self::Pem(error)
    }
}

impl From<rcgen::Error> for Error {
    fn from(error: rcgen::Error) -> Self {
        Self::Request(error)
    }
}

impl From<rustls::Error> for Error {
    fn from(error: rustls::Error) -> Self {
        Self::Tls(error.to_string())
    }
}

/// A key with its certificate, and the trusted CA.
pub(super) struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Vec<CertificateDer<'static>>,
    /// Begin and end of the certificate's validity.
    pub life: (Timestamp, Timestamp),
    /// Names and addresses in the certificate.
    pub names: BTreeSet<String>,
    /// UID of the Node object in the certificate.
    pub uid: Option<String>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("names", &self.names).field("life", &self.life).finish_non_exhaustive()
    }
}

impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        self.chain == other.chain && self.roots == other.roots
    }
}

impl Identity {
    /// Parses a PEM with key and certificate, and a PEM with the CA's certificates, the newest first. `None` if none of
    /// these signed the certificate.
    pub(super) fn parse(pem: &[u8], ca: &str) -> Result<Option<Self>, Error> {
        let chain = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>()?;
        let key = PrivateKeyDer::from_pem_slice(pem)?;
        let roots = CertificateDer::pem_slice_iter(ca.as_bytes()).collect::<Result<Vec<_>, _>>()?;
        let leaf = chain.first().ok_or_else(|| Error::Certificate("the PEM contains none".to_owned()))?;
        let bad = |e: &dyn std::fmt::Display| Error::Certificate(e.to_string());
        let (_, leaf) = X509Certificate::from_der(leaf).map_err(|e| bad(&e))?;
        let signed = roots.iter().any(|root| {
            X509Certificate::from_der(root)
                .is_ok_and(|(_, root)| leaf.verify_signature(Some(root.public_key())).is_ok())
        });
        if !signed {
            return Ok(None);
        }
        let time = |t: i64| Timestamp::from_second(t).map_err(|e| bad(&e));
        let life = (time(leaf.validity().not_before.timestamp())?, time(leaf.validity().not_after.timestamp())?);
        let (names, uid) = (names(&leaf), uid(&leaf));
        Ok(Some(Self { chain, key, roots, life, names, uid }))
    }

    /// True if the certificate must be renewed: two thirds of its validity have passed, or it has other names
    /// or another UID.
    pub(super) fn is_due(&self, names: &BTreeSet<String>, uid: Option<&String>, now: Timestamp) -> bool {
        let (begin, end) = self.life;
        let third = end.duration_since(begin) / 3;
        self.names != *names || uid.is_some() && self.uid.as_ref() != uid || now.duration_since(begin) > third * 2
    }

    /// True after the certificate's validity.
    pub(super) fn is_expired(&self, now: Timestamp) -> bool {
        now > self.life.1
    }

    /// TLS settings of an edge gateway node, which dials.
    pub(super) fn client(&self) -> Result<Arc<ClientConfig>, Error> {
        let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
        let mut config = builder
            .with_root_certificates(Arc::unwrap_or_clone(self.roots()?))
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Arc::new(config))
    }

    /// TLS settings of a cloud gateway node, which is dialled.
    pub(super) fn server(&self) -> Result<Arc<ServerConfig>, Error> {
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots()?, provider())
            .build()
            .map_err(|e| Error::Tls(e.to_string()))?;
        let builder = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
        let mut config =
            builder.with_client_cert_verifier(verifier).with_single_cert(self.chain.clone(), self.key.clone_key())?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Arc::new(config))
    }

    fn roots(&self) -> Result<Arc<RootCertStore>, Error> {
        let mut store = RootCertStore::empty();
        self.roots.iter().try_for_each(|root| store.add(root.clone()))?;
        Ok(Arc::new(store))
    }
}

/// ring, with the cheapest of the three TLS 1.3 ciphers first. All three are secure, and every byte of a site is
/// encrypted twice here.
fn provider() -> Arc<CryptoProvider> {
    use ring::cipher_suite::{TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256};
    let cipher_suites = vec![TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256];
    Arc::new(CryptoProvider { cipher_suites, ..ring::default_provider() })
}

/// The identity in an edge's certificate: its only DNS name, and its UID.
pub(super) fn edge_of(certificate: &CertificateDer<'_>) -> Result<EdgeIdentity, Error> {
    let (_, leaf) = X509Certificate::from_der(certificate).map_err(|e| Error::Certificate(e.to_string()))?;
    let mut names = names(&leaf).into_iter();
    match (names.next(), names.next()) {
        (Some(node), None) => Ok(EdgeIdentity { node, uid: uid(&leaf) }),
        _ => Err(Error::Certificate("it does not name exactly one node".to_owned())),
    }
}

fn alternatives<'a>(leaf: &'a X509Certificate<'_>) -> impl Iterator<Item = &'a GeneralName<'a>> {
    leaf.subject_alternative_name().ok().flatten().into_iter().flat_map(|extension| &extension.value.general_names)
}

fn names(leaf: &X509Certificate<'_>) -> BTreeSet<String> {
    alternatives(leaf)
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            GeneralName::IPAddress(bytes) => match *bytes {
                [a, b, c, d] => Some(std::net::Ipv4Addr::new(*a, *b, *c, *d).to_string()),
                bytes => <[u8; 16]>::try_from(bytes).ok().map(|bytes| std::net::Ipv6Addr::from(bytes).to_string()),
            },
            _ => None,
        })
        .collect()
}

fn uid(leaf: &X509Certificate<'_>) -> Option<String> {
    alternatives(leaf).find_map(|name| match name {
        GeneralName::URI(uri) => uri.strip_prefix(UID_URI).map(str::to_owned),
        _ => None,
    })
}

/// A new private key and its certificate request, both as PEM.
pub(super) fn request(node: &str, names: &BTreeSet<String>) -> Result<(String, String), Error> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::new(names.iter().cloned().collect::<Vec<_>>())?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, ORGANIZATION);
    params.distinguished_name.push(DnType::CommonName, node);
    let request = params.serialize_request(&key)?.pem()?;
    Ok((key.serialize_pem(), request))
}

/// Reads a stored identity; `None` if the file does not exist.
pub(super) fn load(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(reason) => Err(Error::File { path: path.display().to_string(), reason }),
    }
}

/// Stores an identity, readable by root only.
pub(super) fn save(path: &Path, pem: &str) -> Result<(), Error> {
    atomic_file::write(path, pem.as_bytes()).map_err(|reason| Error::File { path: path.display().to_string(), reason })
}
