//! The CAs that sign the proxies' certificates, in the form stored in their Secret. No I/O.
//!
//! Both ends of a proxy connection must trust each other during a rotation: a new CA is published a day before it
//! signs, and an old one stays published until it expires.

use jiff::{SignedDuration, Timestamp};
use raven_api::proxy::UID_URI;
use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use serde::{Deserialize, Serialize};

use super::policy::{Granted, Signer};
use crate::ca::{self, CA_LIFE, CaMaterial, DAY, NewAuthority, is_due, set_validity};

const NAME: &str = "raven-proxy-ca";
/// Organization in the subject of all certificates.
const ORGANIZATION: &str = "raven:proxy";

/// A CA with its key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Authority {
    /// Certificate in PEM.
    pub(crate) certificate: String,
    /// Private key in PEM.
    pub(crate) key: String,
    /// Time of publication.
    pub(crate) since: Timestamp,
    /// End of the validity.
    pub(crate) not_after: Timestamp,
}

/// All valid CAs, the newest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Authorities(Vec<Authority>);

impl CaMaterial for Authorities {
    const KEY: &'static str = "authorities.json";
}

impl Authorities {
    /// Returns the CAs that replace `present`, if a rotation is due.
    pub(crate) fn next(present: Option<&Self>, now: Timestamp) -> Result<Option<Self>, rcgen::Error> {
        let good: Vec<Authority> =
            present.into_iter().flat_map(|p| p.0.iter()).filter(|ca| ca.not_after > now).cloned().collect();
        let fresh = good.first().is_some_and(|newest| !is_due(newest.not_after, CA_LIFE, now));
        if fresh && present.is_some_and(|p| p.0.len() == good.len()) {
            return Ok(None);
        }
        if fresh {
            return Ok(Some(Self(good)));
        }
        let NewAuthority { certificate, key, not_after } = ca::create(NAME, now)?;
        let new = Authority { certificate, key, since: now, not_after };
        Ok(Some(Self(std::iter::once(new).chain(good).collect())))
    }

    /// Returns the certificates of all CAs in PEM.
    pub(crate) fn bundle(&self) -> String {
        self.0.iter().map(|ca| ca.certificate.as_str()).collect()
    }

    /// Signs a granted request. Returns the certificate in PEM.
    pub(crate) fn sign(&self, granted: Granted, now: Timestamp) -> Result<String, rcgen::Error> {
        // The newest CA that was published for more than a day. The first CA signs at once.
        let published = self.0.iter().find(|ca| now.duration_since(ca.since) > DAY);
        let signs = published.or(self.0.last()).ok_or(rcgen::Error::CouldNotParseCertificate)?;
        let issuer = Issuer::new(ca::params(NAME), KeyPair::from_pem(&signs.key)?);
        let Granted { node, uid, names, signer, public_key, life } = granted;
        // Only the key and the checked names are taken from the request.
        let mut params = CertificateParams::new(names)?;
        params.subject_alt_names.push(SanType::URI(format!("{UID_URI}{uid}").try_into()?));
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, ORGANIZATION);
        params.distinguished_name.push(DnType::CommonName, node);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![match signer {
            Signer::Client => ExtendedKeyUsagePurpose::ClientAuth,
            Signer::Server => ExtendedKeyUsagePurpose::ServerAuth,
        }];
        params.use_authority_key_identifier_extension = true;
        let end = (now + life.max(SignedDuration::from_hours(24)) + DAY).min(signs.not_after);
        set_validity(&mut params, now, end);
        Ok(CertificateSigningRequestParams { params, public_key }.signed_by(&issuer)?.pem())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> Timestamp {
        "2026-06-01T12:00:00Z".parse().expect("a time written in a test")
    }

    #[test]
    fn next_ca_is_published_before_it_signs_and_before_the_old_one_expires() {
        let mut authorities = Authorities::next(None, start()).expect("created").expect("there was none");
        assert_eq!(Authorities::next(Some(&authorities), start() + DAY * 1000).expect("checked"), None);
        let first = authorities.clone();
        let mut most = 0;
        for step in 1..800 {
            let now = start() + DAY * (step * 10);
            if let Some(next) = Authorities::next(Some(&authorities), now).expect("created") {
                let signed_until_now =
                    authorities.0.iter().find(|ca| now.duration_since(ca.since) > DAY).expect("one signs");
                assert!(
                    next.0.contains(signed_until_now) || signed_until_now.not_after <= now,
                    "certificates signed yesterday are trusted"
                );
                authorities = next;
            }
            most = most.max(authorities.0.len());
        }
        assert_eq!(most, 2);
        assert_ne!(authorities.bundle(), first.bundle());
    }
}
