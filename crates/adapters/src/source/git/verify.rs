//! Which tags name releases that may be fetched.

use replank_exec::signers::Signers;

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Verify {
    /// All of them.
    #[default]
    Nothing,
    /// Those that one of these keys signed.
    SignedTags(Signers),
    /// The same, where the keys are at the end that clones: what can be seen from here is judged here.
    SignedElsewhere,
}

impl Verify {
    pub(in crate::source) fn wants_signatures(&self) -> bool {
        match self {
            Self::Nothing => false,
            Self::SignedTags(_) | Self::SignedElsewhere => true,
        }
    }
}
