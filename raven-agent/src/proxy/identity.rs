//! Who this node is to the other end of a tunnel: a key that is made here and never leaves, a certificate that the controller signed,
//! and the CA that it trusts. Pure but for the file; [`super::enrol`] gets the certificate.

use std::{
    collections::BTreeSet,
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::Arc,
};

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

use super::plan::Bearer;

/// Protocol of a tunnel, in TLS's words (RFC 7301): another one is no tunnel.
const ALPN: &[u8] = b"raven/1";
/// Organisation in the subject of all of them.
const ORGANIZATION: &str = "raven:proxy";

/// What can be wrong with it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file.
    #[error("identity in {path}: {source}")]
    File {
        /// Which.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// It is no PEM with a key and certificates.
    #[error("read a key and certificates: {0}")]
    Pem(#[from] pem::Error),
    /// The certificate cannot be read.
    #[error("read a certificate: {0}")]
    Certificate(String),
    /// A key or request cannot be made.
    #[error("make a key: {0}")]
    Make(#[from] rcgen::Error),
    /// TLS refuses it.
    #[error("set up TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// TLS refuses the CA.
    #[error("set up TLS: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// Key, certificate and whom it trusts.
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Vec<CertificateDer<'static>>,
    /// When the certificate began and ends.
    pub life: (Timestamp, Timestamp),
    /// Names and addresses that it is for.
    pub names: BTreeSet<String>,
    /// UID of the Node object that it is for.
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
    /// From a PEM with key and certificate, and a PEM with the CA's certificates, the newest first. `None`: none of them signed it.
    pub fn parse(pem: &[u8], ca: &str) -> Result<Option<Self>, Error> {
        let chain = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>()?;
        let key = PrivateKeyDer::from_pem_slice(pem)?;
        let roots = CertificateDer::pem_slice_iter(ca.as_bytes()).collect::<Result<Vec<_>, _>>()?;
        let leaf = chain.first().ok_or_else(|| Error::Certificate("there is none".to_owned()))?;
        let bad = |e: &dyn std::fmt::Display| Error::Certificate(e.to_string());
        let (_, leaf) = X509Certificate::from_der(leaf).map_err(|e| bad(&e))?;
        let signed = roots
            .iter()
            .any(|root| X509Certificate::from_der(root).is_ok_and(|(_, root)| leaf.verify_signature(Some(root.public_key())).is_ok()));
        if !signed {
            return Ok(None);
        }
        let time = |t: i64| Timestamp::from_second(t).map_err(|e| bad(&e));
        let life = (time(leaf.validity().not_before.timestamp())?, time(leaf.validity().not_after.timestamp())?);
        let (names, uid) = (names(&leaf), uid(&leaf));
        Ok(Some(Self { chain, key, roots, life, names, uid }))
    }

    /// True if it is time for a new one: two thirds of its life are over, or it is for other names or another node.
    pub fn is_due(&self, names: &BTreeSet<String>, uid: Option<&String>, now: Timestamp) -> bool {
        let (begin, end) = self.life;
        let third = end.duration_since(begin) / 3;
        self.names != *names || uid.is_some() && self.uid.as_ref() != uid || now.duration_since(begin) > third * 2
    }

    /// True if others would refuse it by now.
    pub fn is_over(&self, now: Timestamp) -> bool {
        now > self.life.1
    }

    /// For an edge gateway node, which dials.
    pub fn client(&self) -> Result<Arc<ClientConfig>, Error> {
        let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
        let mut config = builder
            .with_root_certificates(Arc::unwrap_or_clone(self.roots()?))
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Arc::new(config))
    }

    /// For a cloud gateway node, which is dialled.
    pub fn server(&self) -> Result<Arc<ServerConfig>, Error> {
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots()?, provider()).build()?;
        let builder = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
        let mut config = builder.with_client_cert_verifier(verifier).with_single_cert(self.chain.clone(), self.key.clone_key())?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Arc::new(config))
    }

    fn roots(&self) -> Result<Arc<RootCertStore>, Error> {
        let mut store = RootCertStore::empty();
        self.roots.iter().try_for_each(|root| store.add(root.clone()))?;
        Ok(Arc::new(store))
    }
}

/// ring's, with the cheapest of TLS 1.3's three ciphers first: all three are sound, and every byte of a site passes here twice.
fn provider() -> Arc<CryptoProvider> {
    use ring::cipher_suite::{TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256};
    let cipher_suites = vec![TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256];
    Arc::new(CryptoProvider { cipher_suites, ..ring::default_provider() })
}

/// Whom a certificate of a tunnel's other end is for: its only DNS name, and its UID.
pub fn bearer_of(certificate: &CertificateDer<'_>) -> Result<Bearer, Error> {
    let (_, leaf) = X509Certificate::from_der(certificate).map_err(|e| Error::Certificate(e.to_string()))?;
    let mut names = names(&leaf).into_iter();
    match (names.next(), names.next()) {
        (Some(node), None) => Ok(Bearer { node, uid: uid(&leaf) }),
        _ => Err(Error::Certificate("it names no node, or several".to_owned())),
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

/// A new key, and what the controller is asked to sign: both PEM.
pub fn request(node: &str, names: &BTreeSet<String>) -> Result<(String, String), Error> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::new(names.iter().cloned().collect::<Vec<_>>())?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, ORGANIZATION);
    params.distinguished_name.push(DnType::CommonName, node);
    let request = params.serialize_request(&key)?.pem()?;
    Ok((key.serialize_pem(), request))
}

/// What lies on the disk; `None`: nothing.
pub fn load(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::File { path: path.display().to_string(), source }),
    }
}

/// Written beside and renamed, readable by root alone.
pub fn save(path: &Path, pem: &str) -> Result<(), Error> {
    let write = || -> io::Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let beside = path.with_extension("new");
        let _ = fs::remove_file(&beside);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        file.write_all(pem.as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    write().map_err(|source| Error::File { path: path.display().to_string(), source })
}
