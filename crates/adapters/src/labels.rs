//! The labels that images of Replank carry: how an installation knows its own.

pub const INSTALLATION: &str = "io.replank.installation";
pub const APPLICATION: &str = "io.replank.application";
pub const COMPONENT: &str = "io.replank.component";
pub const JOB: &str = "io.replank.job";
pub const KEY: &str = "io.replank.key";
pub const COMMIT: &str = "io.replank.commit";

/// Of the OCI image specification.
pub const SOURCE: &str = "org.opencontainers.image.source";
pub const REVISION: &str = "org.opencontainers.image.revision";
pub const VERSION: &str = "org.opencontainers.image.version";

/// What a tag begins with that protects its image from every clean-up.
pub const KEEP_TAG: &str = "replank-keep-";
