//! The webhook's own CA and serving certificate.
//!
//! Made here, since the API server must be able to convert before anything else of the cluster works. [`Material::next`] decides, purely,
//! what is to be renewed. A renewal must leave no moment in which the API server trusts nobody who answers:
//! - the serving certificate is renewed after two thirds of its life, under the same CA;
//! - the CA is renewed after two thirds of *its* life, and only put beside the old one; the serving certificate stays the old CA's until
//!   its own time comes, months later, when the API server has long known both. An expired CA leaves the bundle.

use jiff::{SignedDuration, Timestamp};
use rcgen::{Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256};
use serde::{Deserialize, Serialize};

use crate::authority::{self, CA_LIFE, NewAuthority, end, is_due, set_life};

/// Life of a serving certificate.
pub const SERVING_LIFE: SignedDuration = SignedDuration::from_hours(365 * 24);
// Nobody compares it; two of them are told apart by their keys.
const CA_NAME: &str = "raven-controller-webhook-ca";

/// A certificate that could not be made.
#[derive(Debug, thiserror::Error)]
#[error("make the webhook's certificate for {names:?}: {source}")]
pub struct Error {
    /// For which names.
    pub names: Vec<String>,
    /// Why.
    pub source: rcgen::Error,
}

/// A CA that the API server is told to trust.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Authority {
    /// PEM.
    pub certificate: String,
    /// When it ends.
    pub not_after: Timestamp,
}

/// All of it, as the Secret keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Material {
    /// The newest first: it signs.
    pub authorities: Vec<Authority>,
    /// PEM, of the newest.
    pub ca_key: String,
    /// PEM of the serving certificate.
    pub certificate: String,
    /// PEM of its key.
    pub key: String,
    /// When it ends.
    pub not_after: Timestamp,
    /// What it is for.
    pub names: Vec<String>,
}

/// What was made anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// Everything.
    First,
    /// A CA, put beside the old one.
    Ca,
    /// The serving certificate.
    Serving,
}

// === impl Material ===

impl Material {
    /// What should be there instead of `present`, if anything.
    pub fn next(present: Option<&Self>, names: &[String], now: Timestamp) -> Result<Option<(Self, Renewal)>, Error> {
        let error = |source| Error { names: names.to_vec(), source };
        let Some(present) = present.filter(|m| m.authorities.first().is_some_and(|ca| ca.not_after > now)) else {
            return Self::first(names, now).map(|made| Some((made, Renewal::First))).map_err(error);
        };
        let lacks_name = names.iter().any(|name| !present.names.contains(name));
        if lacks_name || is_due(present.not_after, SERVING_LIFE, now) {
            return present.renewed(names, now).map(|made| Some((made, Renewal::Serving))).map_err(error);
        }
        if is_due(present.authorities[0].not_after, CA_LIFE, now) {
            return present.with_new_ca(now).map(|made| Some((made, Renewal::Ca))).map_err(error);
        }
        Ok(None)
    }

    /// What the API server is to trust, PEM.
    pub fn bundle(&self) -> String {
        self.authorities.iter().map(|ca| ca.certificate.as_str()).collect()
    }

    fn first(names: &[String], now: Timestamp) -> Result<Self, rcgen::Error> {
        let (authority, ca_key) = make_ca(now)?;
        let blank = Self {
            authorities: vec![authority],
            ca_key,
            certificate: String::new(),
            key: String::new(),
            not_after: now,
            names: Vec::new(),
        };
        blank.renewed(names, now)
    }

    fn with_new_ca(&self, now: Timestamp) -> Result<Self, rcgen::Error> {
        let (authority, ca_key) = make_ca(now)?;
        let old = self.authorities.iter().filter(|ca| ca.not_after > now).cloned();
        Ok(Self { authorities: std::iter::once(authority).chain(old).collect(), ca_key, ..self.clone() })
    }

    fn renewed(&self, names: &[String], now: Timestamp) -> Result<Self, rcgen::Error> {
        let issuer = Issuer::new(authority::params(CA_NAME), KeyPair::from_pem(&self.ca_key)?);
        // A certificate outlives no CA.
        let not_after = end(now, SERVING_LIFE).min(self.authorities[0].not_after);
        let mut params = CertificateParams::new(names.to_vec())?;
        params.distinguished_name.push(DnType::CommonName, names.first().map(String::as_str).unwrap_or(CA_NAME));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        set_life(&mut params, now, not_after);
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate: Certificate = params.signed_by(&key, &issuer)?;
        let authorities = self.authorities.iter().filter(|ca| ca.not_after > now).cloned().collect();
        Ok(Self { authorities, certificate: certificate.pem(), key: key.serialize_pem(), not_after, names: names.to_vec(), ..self.clone() })
    }
}

fn make_ca(now: Timestamp) -> Result<(Authority, String), rcgen::Error> {
    let NewAuthority { certificate, key, not_after } = authority::make(CA_NAME, now)?;
    Ok((Authority { certificate, not_after }, key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::DAY;

    fn names() -> Vec<String> {
        vec!["hook.kube-system.svc".to_owned(), "10.0.0.5".to_owned()]
    }

    fn start() -> Timestamp {
        "2026-06-01T12:00:00Z".parse().expect("a time written in a test")
    }

    fn made(present: Option<&Material>, now: Timestamp) -> Option<(Material, Renewal)> {
        Material::next(present, &names(), now).expect("certificates can be made")
    }

    fn first() -> Material {
        made(None, start()).expect("there was nothing").0
    }

    fn days(n: i64) -> SignedDuration {
        DAY * i32::try_from(n).expect("a small number")
    }

    #[test]
    fn made_once_it_is_kept() {
        let material = first();
        assert_eq!(made(Some(&material), start()), None);
        assert_eq!(made(Some(&material), start() + days(200)), None);
        let (other, why) = Material::next(Some(&material), &["other".to_owned()], start()).expect("made").expect("lacks a name");
        assert_eq!((why, other.bundle(), other.names), (Renewal::Serving, material.bundle(), vec!["other".to_owned()]));
    }

    #[test]
    fn the_serving_certificate_is_renewed_under_the_same_ca() {
        let material = first();
        let (renewed, why) = made(Some(&material), start() + days(260)).expect("two thirds are over");
        assert_eq!((why, renewed.bundle() == material.bundle()), (Renewal::Serving, true));
        assert_ne!(renewed.certificate, material.certificate);
    }

    #[test]
    fn a_new_ca_joins_the_old_one_long_before_it_signs_and_an_expired_one_leaves() {
        let mut material = first();
        // Eight years of an hourly look, in steps of ten days: whatever serves must be trusted by a bundle that was there the step before.
        let mut cas = 1;
        for step in 1..=400 {
            let now = start() + days(step * 10);
            let before = material.clone();
            while let Some((next, why)) = made(Some(&material), now) {
                assert!(why != Renewal::First && next.not_after > now, "{why:?} at step {step}");
                cas += usize::from(why == Renewal::Ca);
                if why == Renewal::Serving {
                    assert_eq!(next.authorities[0].not_after, before.authorities[0].not_after, "signed by a CA that nobody knows yet");
                }
                material = next;
            }
            assert!(material.authorities.len() <= 2);
            assert!(material.not_after > now);
        }
        assert!(cas >= 2, "a CA was renewed");
    }

    #[test]
    fn what_has_run_out_is_made_anew() {
        let material = first();
        let (_, why) = made(Some(&material), start() + CA_LIFE).expect("nothing is good any more");
        assert_eq!(why, Renewal::First);
    }
}
