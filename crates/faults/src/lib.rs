//! Development only: a fault at every recorded step and every effect of the real service on its real parts, and the judgement
//! of what each leaves. The service itself knows nothing of it: `replank::cli::main_with` is all that it gives away.

pub mod doors;
pub mod gate;
pub mod judge;
pub mod matrix;
pub mod point;
pub mod rig;
